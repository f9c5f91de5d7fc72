"""train: the gate and the experts, jointly and adversarially.

Reads `seed`, `epsilon`, `train`, the data set and the pre-trained experts. Writes artifacts/train/mixture.safetensors,
metrics/train/mixture.json and plots/train/mixture.csv.
"""

from advmoe import classifiers, paths
from advmoe.classifiers import Plain
from advmoe.data import dataset
from advmoe.errors import UserError
from advmoe.params import Epsilon, Seed, load_section
from advmoe.training.joint import JointRecipe, train_mixture
from advmoe.training.record import record


def run() -> None:
    """Train the mixture of the experts that `train.experts` lists."""
    seed, epsilon, recipe = (
        load_section("seed", Seed),
        load_section("epsilon", Epsilon),
        load_section("train", JointRecipe),
    )
    data = dataset.load(paths.DATASET)
    experts = {name: classifiers.load(paths.artifact("pretrain", name)) for name in recipe.experts}
    for name, expert in experts.items():
        if expert.header.inputs.get("dataset") != data.sha256:
            raise UserError(
                f"{paths.artifact('pretrain', name)}: trained on other data than {paths.DATASET}; run `dvc repro`"
            )
    architectures = {name: expert.about.architecture for name, expert in experts.items()}
    backbones = {plain.backbone for plain in architectures.values() if isinstance(plain, Plain)}
    if len(backbones) != 1:
        raise UserError("train.experts: the experts have different backbones; run `dvc repro`")
    models = [expert.model for expert in experts.values()]
    trained, architecture = train_mixture(models, backbones.pop(), data, recipe, seed=seed, epsilon=epsilon)
    record(
        "train",
        "mixture",
        trained,
        architecture,
        data.facts,
        params={"recipe": recipe, "epsilon": epsilon},
        inputs={"dataset": data.sha256} | {f"expert {name}": expert.header.sha256 for name, expert in experts.items()},
        seed=seed,
    )

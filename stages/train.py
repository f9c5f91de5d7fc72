"""train: the gate and the experts, jointly and adversarially.

Reads `seed`, `epsilon`, `train`, the data set and the pre-trained experts. Writes artifacts/train/mixture.safetensors,
metrics/train/mixture.json and plots/train/mixture.csv.
"""

from advmoe import paths, state
from advmoe.data import dataset
from advmoe.params import Epsilon, Seed, load_section
from advmoe.training import cost
from advmoe.training.experts import backbone_of, hashes, load_experts
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
    experts = load_experts(recipe.experts, data)
    with state.work("train", recipe, seed, epsilon, hashes(data, experts)) as shelf:
        trained, architecture = train_mixture(
            [expert.model for expert in experts.values()],
            backbone_of(experts),
            data,
            recipe,
            seed=seed,
            epsilon=epsilon,
            spent=cost.spent(experts),
            shelf=shelf,
        )
        record(
            "train",
            "mixture",
            trained,
            architecture,
            data.facts,
            params={"recipe": recipe, "epsilon": epsilon},
            inputs=hashes(data, experts),
            seed=seed,
        )

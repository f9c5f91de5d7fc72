"""train: the gate and the experts, jointly and adversarially.

Reads `seed`, `epsilon`, `train`, the data set and the pre-trained experts. Writes artifacts/train/mixture.safetensors,
metrics/train/mixture.json, plots/train/mixture.csv and artifacts/start/distilled.json.
"""

from advmoe.core import artifacts, files, paths
from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.data import dataset
from advmoe.runtime import distributed
from advmoe.training.joint import JointConfig, pretrained_run, train_and_save


def run() -> None:
    """Trains the mixture of the experts that `train.experts` lists."""
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    recipe, data = load_section("train", JointConfig), dataset.load(paths.DATASET)
    train_and_save("train", "mixture", pretrained_run(data, recipe, seed=seed, epsilon=epsilon))
    if distributed.is_rank0():
        mixture = {"mixture": artifacts.load(paths.MIXTURE).header.sha256}
        files.write_text(paths.start("distilled"), files.canonical_json(mixture) + "\n")

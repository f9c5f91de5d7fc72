"""train: the gate and the experts, jointly and adversarially.

Reads `seed`, `epsilon`, `train`, the data set and the pre-trained experts. Writes artifacts/train/mixture.safetensors,
metrics/train/mixture.json and plots/train/mixture.csv.
"""

from advmoe import paths
from advmoe.data import dataset
from advmoe.params import Epsilon, Seed, load_section
from advmoe.training.joint import JointRecipe, train_and_record


def run() -> None:
    """Train the mixture of the experts that `train.experts` lists."""
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    recipe, data = load_section("train", JointRecipe), dataset.load(paths.DATASET)
    train_and_record("train", "mixture", "mixture", recipe, data, seed=seed, epsilon=epsilon)

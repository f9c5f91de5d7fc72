"""train: the gate and the experts, jointly and adversarially.

Reads `seed`, `epsilon`, `train`, the data set and the pre-trained experts. Writes artifacts/train/mixture.safetensors,
metrics/train/mixture.json and plots/train/mixture.csv.
"""

from advmoe.core import paths
from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.data import dataset
from advmoe.training.joint import JointConfig, train_and_record


def run() -> None:
    """Train the mixture of the experts that `train.experts` lists."""
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    recipe, data = load_section("train", JointConfig), dataset.load(paths.DATASET)
    train_and_record("train", "mixture", "mixture", recipe, data, seed=seed, epsilon=epsilon)

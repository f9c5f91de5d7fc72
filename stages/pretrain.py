"""pretrain@NAME: one expert, trained on its own.

Reads `seed`, `model`, `pretrain`, `experts.NAME` (and `epsilon` if that expert meets the threat model) and the data
set. Writes artifacts/pretrain/NAME.safetensors, metrics/pretrain/NAME.json and plots/pretrain/NAME.csv.
"""

from advmoe import paths
from advmoe.classifiers import Backbone
from advmoe.data import dataset
from advmoe.params import Epsilon, Seed, load_section
from advmoe.training.single import SingleRecipe, Student, train_and_record


def run(name: str) -> None:
    """Train the expert called `name` in params.yaml."""
    seed, backbone = load_section("seed", Seed), load_section("model", Backbone)
    student, recipe = load_section(f"experts.{name}", Student), load_section("pretrain", SingleRecipe)
    epsilon = load_section("epsilon", Epsilon) if student.meets_threat_model else None
    data = dataset.load(paths.DATASET)
    train_and_record("pretrain", name, name, student, backbone, data, recipe, seed=seed, epsilon=epsilon)

"""baseline@NAME: one plain network to compare the mixture with: the experts' recipe, for as many epochs in total.

Reads `seed`, `model`, `pretrain`, `train.epochs`, `baseline.NAME` (and `epsilon` if it meets the threat model) and the
data set. Writes artifacts/baseline/NAME.safetensors, metrics/baseline/NAME.json and plots/baseline/NAME.csv.
"""

from advmoe import paths
from advmoe.classifiers import Backbone
from advmoe.data import dataset
from advmoe.params import Epsilon, PositiveInt, Seed, load_section
from advmoe.training.single import SingleRecipe, Student, baseline_recipe, train_and_record


def run(name: str) -> None:
    """Train the baseline called `name` in params.yaml."""
    seed, backbone = load_section("seed", Seed), load_section("model", Backbone)
    student, recipe = load_section(f"baseline.{name}", Student), load_section("pretrain", SingleRecipe)
    recipe = baseline_recipe(recipe, load_section("train.epochs", PositiveInt))
    epsilon = load_section("epsilon", Epsilon) if student.meets_threat_model else None
    data = dataset.load(paths.DATASET)
    train_and_record("baseline", name, f"baseline-{name}", student, backbone, data, recipe, seed=seed, epsilon=epsilon)

"""pretrain@NAME: one expert, trained on its own.

Reads `seed`, `model`, `pretrain`, `experts.NAME` (and `epsilon` if that expert is trained at it) and the data
set. Writes artifacts/pretrain/NAME.safetensors, metrics/pretrain/NAME.json and plots/pretrain/NAME.csv.
"""

from advmoe.core import paths
from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.data import dataset
from advmoe.models.classifiers import BackboneSettings
from advmoe.training.single import NetworkSpec, SingleConfig, SingleRun, train_and_save


def run(name: str) -> None:
    """Trains the expert `name` of params.yaml."""
    seed, backbone = load_section("seed", Seed), load_section("model", BackboneSettings)
    spec, recipe = load_section(f"experts.{name}", NetworkSpec), load_section("pretrain", SingleConfig)
    epsilon = load_section("epsilon", Epsilon) if spec.uses_threat_epsilon else None
    data = dataset.load(paths.DATASET)
    train_and_save("pretrain", name, SingleRun(name, spec, backbone, data, recipe, seed, epsilon))

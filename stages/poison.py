"""poison@NAME: one poisoning study, an attack on the training data and its effect on every victim.

Reads `poison` (of its attacks only `poison.attacks.NAME`), `seed`, `epsilon`, the settings of training (`model`,
`pretrain`, `experts`, `train`, `baseline`), the data set, and the pipeline's models as clean twins. Writes
artifacts/poison/NAME/ (poisoned sets and victims), metrics/poison/NAME.json, metrics/poison-runs/NAME.json and
plots/poison/NAME/.
"""

from advmoe.core import paths
from advmoe.core.settings import load_section
from advmoe.data import dataset
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.poisoning import report
from advmoe.threats.poisoning.config import PoisonSection
from advmoe.threats.poisoning.experiment import PoisonExperiment, run_experiment
from advmoe.threats.victim_training import VictimRecipes

STAGE = "poison"


def run(name: str) -> None:
    """Runs the study `name` of params.yaml."""
    section = load_section("poison", PoisonSection)
    experiment = PoisonExperiment(
        name, section.named(name), section.common, VictimRecipes.from_params(), dataset.load(paths.DATASET)
    )
    outputs = OutputPaths(
        models=paths.ARTIFACTS / STAGE / name,
        metrics=paths.metrics(STAGE, name),
        runs=paths.metrics(report.RUNS, name),
        plots=paths.PLOTS / STAGE / name,
    )
    run_experiment(experiment, outputs)

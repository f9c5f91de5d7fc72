"""poison@NAME: one attack on the training data, and what it gets its attacker from each kind of victim.

Reads `poison` (of its attacks only `poison.attacks.NAME`), `seed`, `epsilon`, all that training reads (`model`,
`pretrain`, `experts`, `train`, `baseline`), the data set, and the pipeline's models as clean twins. Writes
artifacts/poison/NAME/ (poisoned sets and victims), metrics/poison/NAME.json, metrics/poison-runs/NAME.json and
plots/poison/NAME/.
"""

from advmoe.core import paths
from advmoe.core.settings import load_section
from advmoe.data import dataset
from advmoe.threats.poisoning import experiment, report
from advmoe.threats.poisoning.config import PoisonSection
from advmoe.threats.poisoning.experiment import OutputPaths, PoisonExperiment
from advmoe.threats.victim_training import VictimRecipes

STAGE = "poison"


def run(name: str) -> None:
    """Try the attack called `name` in params.yaml."""
    section = load_section("poison", PoisonSection)
    case = PoisonExperiment(name, section.named(name), section, VictimRecipes.read(), dataset.load(paths.DATASET))
    places = OutputPaths(
        models=paths.ARTIFACTS / STAGE / name,
        metrics=paths.metrics(STAGE, name),
        runs=paths.metrics(report.RUNS, name),
        plots=paths.PLOTS / STAGE / name,
    )
    experiment.run_experiment(case, places)

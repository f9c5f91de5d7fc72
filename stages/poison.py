"""poison@NAME: one attack on the training data, and what it gets its attacker from each kind of victim.

Reads `poison` (of its attacks only `poison.attacks.NAME`), `seed`, `epsilon`, all that training reads (`model`,
`pretrain`, `experts`, `train`, `baseline`), the data set, and the pipeline's models as clean twins. Writes
artifacts/poison/NAME/ (poisoned sets and victims), metrics/poison/NAME.json, metrics/poison-runs/NAME.json and
plots/poison/NAME/.
"""

from advmoe import paths
from advmoe.data import dataset
from advmoe.params import load_section
from advmoe.threats.poisoning import report, study
from advmoe.threats.poisoning.settings import PoisonSection
from advmoe.threats.poisoning.study import Case, Places
from advmoe.threats.retraining import Recipes

STAGE = "poison"


def run(name: str) -> None:
    """Try the attack called `name` in params.yaml."""
    section = load_section("poison", PoisonSection)
    case = Case(name, section.named(name), section, Recipes.read(), dataset.load(paths.DATASET))
    places = Places(
        models=paths.ARTIFACTS / STAGE / name,
        metrics=paths.metrics(STAGE, name),
        runs=paths.metrics(report.RUNS, name),
        plots=paths.PLOTS / STAGE / name,
    )
    study.conduct(case, places)

"""extract@NAME: one attack by queries alone, and what it gets its attacker from each victim.

Reads `extract` (of its attacks only `extract.attacks.NAME`), `seed`, `epsilon`, the data set, and the pipeline's models
as victims. Writes artifacts/extract/NAME/ (transfer sets and surrogates), metrics/extract/NAME.json,
metrics/extract-runs/NAME.json and plots/extract/NAME/.
"""

from advmoe import paths
from advmoe.params import Epsilon, Seed, load_section
from advmoe.threats.extraction import report, study
from advmoe.threats.extraction.settings import ExtractSection
from advmoe.threats.extraction.study import Case, Places

STAGE = "extract"


def run(name: str) -> None:
    """Try the attack called `name` in params.yaml."""
    section = load_section("extract", ExtractSection)
    case = Case(
        name=name,
        study=section.named(name),
        common=section,
        seed=load_section("seed", Seed),
        epsilon=load_section("epsilon", Epsilon),
        weights=None,
        folder=paths.ARTIFACTS / STAGE / name,
    )
    places = Places(
        metrics=paths.metrics(STAGE, name),
        runs=paths.metrics(report.RUNS, name),
        plots=paths.PLOTS / STAGE / name,
    )
    study.conduct(case, places)

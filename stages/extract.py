"""extract@NAME: one attack by queries alone, and what it gets its attacker from each victim.

Reads `extract` (of its attacks only `extract.attacks.NAME`), `seed`, `epsilon`, the data set, and the pipeline's models
as victims. Writes artifacts/extract/NAME/ (transfer sets and surrogates), metrics/extract/NAME.json,
metrics/extract-runs/NAME.json and plots/extract/NAME/.
"""

from advmoe.core import paths
from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.threats.extraction import experiment, report
from advmoe.threats.extraction.config import ExtractSection
from advmoe.threats.extraction.experiment import ExtractionExperiment, OutputPaths

STAGE = "extract"


def run(name: str) -> None:
    """Try the attack called `name` in params.yaml."""
    section = load_section("extract", ExtractSection)
    case = ExtractionExperiment(
        name=name,
        study=section.named(name),
        common=section,
        seed=load_section("seed", Seed),
        epsilon=load_section("epsilon", Epsilon),
        weights=None,
        folder=paths.ARTIFACTS / STAGE / name,
    )
    places = OutputPaths(
        metrics=paths.metrics(STAGE, name),
        runs=paths.metrics(report.RUNS, name),
        plots=paths.PLOTS / STAGE / name,
    )
    experiment.run_experiment(case, places)

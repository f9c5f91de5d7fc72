"""extract@NAME: one model extraction study, an attack by queries on every victim.

Reads `extract` (of its attacks only `extract.attacks.NAME`), `seed`, `epsilon`, the data set, and the pipeline's models
as victims. Writes artifacts/extract/NAME/ (transfer sets and surrogates), metrics/extract/NAME.json,
metrics/extract-runs/NAME.json and plots/extract/NAME/.
"""

from advmoe.core import paths
from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.extraction import report
from advmoe.threats.extraction.config import ExtractSection
from advmoe.threats.extraction.experiment import ExtractionExperiment, run_experiment

STAGE = "extract"


def run(name: str) -> None:
    """Runs the study `name` of params.yaml."""
    section = load_section("extract", ExtractSection)
    experiment = ExtractionExperiment(
        name=name,
        study=section.named(name),
        common=section.common,
        seed=load_section("seed", Seed),
        epsilon=load_section("epsilon", Epsilon),
        weights=None,
    )
    outputs = OutputPaths(
        models=paths.ARTIFACTS / STAGE / name,
        metrics=paths.metrics(STAGE, name),
        runs=paths.metrics(report.RUNS, name),
        plots=paths.PLOTS / STAGE / name,
    )
    run_experiment(experiment, outputs)

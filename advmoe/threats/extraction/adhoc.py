"""Quick run of an extraction study: settings of params.yaml, overridden from the command line, written to `runs/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.threats.adhoc import override, run_in_new_folder
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.extraction.config import ExtractSection, Study
from advmoe.threats.extraction.experiment import ExtractionExperiment, run_experiment


@dataclass(frozen=True)
class ExtractionRequest:
    """The study `name` of params.yaml and its settings to override; None or empty: as in params.yaml.

    `weights`: file of weights for a victim `path/to/file.py:factory`.
    """

    name: str
    budgets: Sequence[int] = ()
    answers: Sequence[str] = ()
    victims: Sequence[str] = ()
    surrogates: Sequence[str] = ()
    seeds: Sequence[int] = ()
    weights: Path | None = None


def run_request(request: ExtractionRequest) -> OutputPaths:
    """Runs the study and returns where its results are. Raises UserError for an invalid request."""
    section = load_section("extract", ExtractSection)
    experiment = ExtractionExperiment(
        name=request.name,
        study=_override_study(section.named(request.name), request),
        common=section.common,
        seed=load_section("seed", Seed),
        epsilon=load_section("epsilon", Epsilon),
        weights=request.weights,
    )
    return run_in_new_folder(f"extract-{request.name}", partial(run_experiment, experiment))


def _override_study(study: Study, request: ExtractionRequest) -> Study:
    options = {
        "budgets": request.budgets,
        "answers": request.answers,
        "victims": request.victims,
        "surrogates": request.surrogates,
        "seeds": request.seeds,
    }
    return override(study, options, f"extract {request.name}")

"""The quick question: an attack of params.yaml with a few things changed on the command line, answered in `runs/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from advmoe.core import paths
from advmoe.core.settings import Epsilon, Seed, load_section, validate
from advmoe.threats.extraction import experiment
from advmoe.threats.extraction.config import ExtractSection, Study
from advmoe.threats.extraction.experiment import ExtractionExperiment, OutputPaths


@dataclass(frozen=True)
class ExtractionRequest:
    """What was asked for; nothing means: as params.yaml says. `weights` belong to a victim that is code."""

    name: str
    budgets: Sequence[int] = ()
    answers: Sequence[str] = ()
    victims: Sequence[str] = ()
    surrogates: Sequence[str] = ()
    seeds: Sequence[int] = ()
    weights: Path | None = None


def run_request(question: ExtractionRequest) -> OutputPaths:
    """Ask, train, measure, print; returns where all of it lies. Raises UserError for what cannot be."""
    section = load_section("extract", ExtractSection)
    changed = _changed(section.named(question.name), question)
    folder = paths.RUNS / f"extract-{question.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    case = ExtractionExperiment(
        name=question.name,
        study=changed,
        common=section,
        seed=load_section("seed", Seed),
        epsilon=load_section("epsilon", Epsilon),
        weights=question.weights,
        folder=folder / "models",
    )
    places = OutputPaths(folder / "metrics.json", folder / "runs.json", folder)
    experiment.run_experiment(case, places)
    return places


def _changed(asked: Study, question: ExtractionRequest) -> Study:
    changes = {
        "budgets": question.budgets,
        "answers": question.answers,
        "victims": question.victims,
        "surrogates": question.surrogates,
        "seeds": question.seeds,
    }
    content = asked.model_dump() | {name: tuple(value) for name, value in changes.items() if value}
    return validate(content, Study, f"extract {question.name}")

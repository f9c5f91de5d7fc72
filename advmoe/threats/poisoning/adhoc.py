"""The quick question: an attack of params.yaml with a few things changed on the command line, answered in `runs/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from advmoe.core import paths
from advmoe.core.settings import load_section, validate
from advmoe.data import dataset
from advmoe.threats.poisoning import experiment, registry
from advmoe.threats.poisoning.config import PoisonSection, Study
from advmoe.threats.poisoning.experiment import OutputPaths, PoisonExperiment
from advmoe.threats.victim_training import VictimRecipes


@dataclass(frozen=True)
class PoisonRequest:
    """What was asked for; nothing means: as params.yaml says."""

    name: str
    rates: Sequence[float] = ()
    target: int | None = None
    victims: Sequence[str] = ()
    seeds: Sequence[int] = ()
    defences: Sequence[str] = ()


def run_request(question: PoisonRequest) -> OutputPaths:
    """Poison, train, measure, print; returns where all of it lies. Raises UserError for what cannot be."""
    section = load_section("poison", PoisonSection)
    changed = _changed(section.named(question.name), question)
    section = section.model_copy(update={"attacks": {question.name: changed}})
    case = PoisonExperiment(question.name, changed, section, VictimRecipes.read(), dataset.load(paths.DATASET))
    folder = paths.RUNS / f"poison-{question.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    places = OutputPaths(folder / "models", folder / "metrics.json", folder / "runs.json", folder)
    experiment.run_experiment(case, places)
    return places


def _changed(asked: Study, question: PoisonRequest) -> Study:
    attack = asked.attack if question.target is None else registry.aimed_at(asked.attack, question.target)
    changes = {
        "rates": question.rates,
        "victims": question.victims,
        "seeds": question.seeds,
        "defences": question.defences,
    }
    content = asked.model_dump() | {name: tuple(value) for name, value in changes.items() if value}
    return validate(content | {"attack": attack.model_dump()}, Study, f"poison {question.name}")

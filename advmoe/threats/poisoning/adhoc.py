"""Quick run of a poisoning study: settings of params.yaml, overridden from the command line, written to `runs/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from advmoe.core import paths
from advmoe.core.settings import load_section
from advmoe.data import dataset
from advmoe.threats.adhoc import override, run_in_new_folder
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.poisoning import registry
from advmoe.threats.poisoning.config import PoisonSection, Study
from advmoe.threats.poisoning.experiment import PoisonExperiment, run_experiment
from advmoe.threats.victim_training import VictimRecipes


@dataclass(frozen=True)
class PoisonRequest:
    """The study `name` of params.yaml and its settings to override; None or empty: as in params.yaml."""

    name: str
    rates: Sequence[float] = ()
    target: int | None = None
    victims: Sequence[str] = ()
    seeds: Sequence[int] = ()
    defences: Sequence[str] = ()


def run_request(request: PoisonRequest) -> OutputPaths:
    """Runs the study and returns where its results are. Raises UserError for an invalid request."""
    section = load_section("poison", PoisonSection)
    study = _override_study(section.named(request.name), request)
    recipes, data = VictimRecipes.from_params(), dataset.load(paths.DATASET)
    experiment = PoisonExperiment(request.name, study, section.common, recipes, data)
    return run_in_new_folder(f"poison-{request.name}", partial(run_experiment, experiment))


def _override_study(study: Study, request: PoisonRequest) -> Study:
    if request.target is not None:
        study = study.model_copy(update={"attack": registry.with_target(study.attack, request.target)})
    options = {
        "rates": request.rates,
        "victims": request.victims,
        "seeds": request.seeds,
        "defences": request.defences,
    }
    return override(study, options, f"poison {request.name}")

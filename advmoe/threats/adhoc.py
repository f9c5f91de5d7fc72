"""Quick runs: an experiment of params.yaml with settings from the command line, written to a new folder in `runs/`."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from advmoe.core import paths
from advmoe.core.settings import Settings, validate
from advmoe.threats.experiment import OutputPaths

S = TypeVar("S", bound=Settings)


def override(study: S, options: Mapping[str, Sequence[Any]], title: str) -> S:
    """Returns the settings with every option that is not empty in place of the value in params.yaml.

    Raises UserError for values that are not valid; the message starts with `title`.
    """
    given = {name: tuple(values) for name, values in options.items() if values}
    return validate(study.model_dump() | given, type(study), title)


def run_in_new_folder(label: str, run_experiment: Callable[[OutputPaths], None]) -> OutputPaths:
    """Runs an experiment that writes to a new folder `runs/LABEL-TIMESTAMP/`; returns the paths in it."""
    outputs = OutputPaths.in_folder(paths.RUNS / f"{label}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}")
    run_experiment(outputs)
    return outputs

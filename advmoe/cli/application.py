"""The Typer application, its exit codes, and what the commands share. Torch is imported inside commands only."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from advmoe.core import console
from advmoe.core.errors import UserError
from advmoe.runtime import signals

STAGES, RESULTS, MODELS, PROJECT = "Stages (run by dvc repro)", "Results", "Models and attacks", "Project"
EXIT_USER_ERROR = 2

_final_checks: list[Callable[[], None]] = []  # run when the command has ended without an error


def _run_final_checks(*_: object, **__: object) -> None:
    for check in _final_checks:
        check()


app = typer.Typer(
    result_callback=_run_final_checks,
    help="Robust image classifiers from a mixture of adversarially trained experts, and the evidence for them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.info(f"advmoe {version('advmoe')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Robust image classifiers from a mixture of adversarially trained experts, and the evidence for them."""
    del version


def main() -> None:
    """Run the command line. A UserError ends with one sentence and exit code 2, a signal with 128 plus its number."""
    _final_checks.clear()
    try:
        with signals.handle_signals():
            app()
    except UserError as error:
        console.error(f"error: {error}")
        sys.exit(EXIT_USER_ERROR)
    except signals.Interrupted as interrupted:
        console.err.print(f"interrupted; {signals.RESUME_HINT}", style="red")
        sys.exit(interrupted.exit_code)


def start_stage(stage: str) -> None:
    """Validates all of params.yaml, then sets threads, determinism and the code fingerprint that keys checkpoints."""
    check_project()
    start_single_process()
    _set_stage(stage)


@contextmanager
def distributed_stage(stage: str) -> Iterator[None]:
    """Context manager for a stage that the processes of torchrun run together."""
    check_project()
    from advmoe.runtime import distributed, machine

    machine.prepare_torch()
    _set_stage(stage)
    with distributed.process_group():
        yield


def check_project() -> None:
    """Validates params.yaml and dvc.yaml; after the command, checks that params.yaml did not change meanwhile."""
    from advmoe.config import schema, validation
    from advmoe.core import settings
    from advmoe.runtime import machine

    _final_checks.append(settings.track_changes())
    machine.refuse_unknown_launchers()
    validation.check_dvc_file(schema.load_params())


def start_single_process() -> None:
    """Sets threads and determinism. Under torchrun all processes but the first exit."""
    from advmoe.runtime import distributed, machine

    if distributed.is_secondary_process():
        raise typer.Exit
    machine.prepare_torch()


def refuse_options(options: Sequence[object]) -> None:
    """Raises UserError when --record, which runs the stage with the settings of params.yaml, has another option."""
    if any(option is not None and option != [] for option in options):
        raise UserError("--record uses the settings of params.yaml and cannot be combined with other options")


def _set_stage(stage: str) -> None:
    from advmoe.runtime import code_fingerprint

    code_fingerprint.set_stage(stage)

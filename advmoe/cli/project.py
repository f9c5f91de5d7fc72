"""Commands about the project and this machine: profiles, validation, cost, unfinished work."""

from typing import Annotated

import typer

from advmoe.cli.application import PROJECT, app, start_single_process
from advmoe.core import console, files


@app.command(rich_help_panel=PROJECT)
def use(
    profile: Annotated[
        list[str], typer.Argument(help="A file of profiles/, without .yaml; several are applied in order.")
    ],
    show: Annotated[bool, typer.Option("--show", help="Print what would change, and change nothing.")] = False,
) -> None:
    """Apply a profile to params.yaml; comments are kept."""
    from advmoe.config import profiles

    changes = profiles.use(*profile, write=not show)
    if not changes:
        console.info(f"params.yaml already agrees with {files.join_names(profile)}")
    elif show:
        for change in changes:
            console.info(str(change))
    else:
        console.info(f"params.yaml: {files.join_names(change.key for change in changes)}")


@app.command(rich_help_panel=PROJECT)
def check() -> None:
    """Validate params.yaml, dvc.yaml and the environment, and list the stages that would run."""
    from advmoe.config import validation

    pending = validation.check()
    console.info("params.yaml, dvc.yaml and the environment are valid")
    console.info(f"dvc repro would run: {files.join_names(pending)}" if pending else "dvc repro has nothing to do")


@app.command(rich_help_panel=PROJECT)
def cost(
    flops: Annotated[
        float | None, typer.Option(min=1.0, help="Operations per second, e.g. 300e12; default: measured here.")
    ] = None,
) -> None:
    """Forecast operations and hours of each stage under params.yaml."""
    from advmoe.config import schema

    params = schema.load_params()
    start_single_process()
    from advmoe.config import cost_forecast

    cost_forecast.show(params, flops)


@app.command(rich_help_panel=PROJECT)
def clean(
    everything: Annotated[
        bool, typer.Option("--all", help="Also delete unfinished work that could be resumed.")
    ] = False,
) -> None:
    """Delete unfinished work of other versions of the code; work in use is kept."""
    from advmoe.runtime.checkpoints import workdir

    cleaned = workdir.clean(everything=everything)
    console.info(f"{cleaned.removed} folders of unfinished work deleted, {cleaned.freed_bytes / 1e6:.1f} MB")
    if cleaned.resumable:
        console.info(f"{cleaned.resumable} can be resumed; `advmoe clean --all` deletes them too")
    if cleaned.in_use:
        console.info(f"{cleaned.in_use} kept: a process uses them")


@app.command(rich_help_panel=PROJECT)
def info() -> None:
    """Show this machine: device, threads, folders, versions."""
    start_single_process()
    from advmoe.runtime import machine

    console.table("this machine", ["what", "value"], machine.describe())

"""Commands about results: tables of the last run, claims, claims over seeds."""

from typing import Annotated

import typer

from advmoe.cli.application import RESULTS, app
from advmoe.core import console, paths


@app.command(rich_help_panel=RESULTS)
def results() -> None:
    """Show the results of the last `dvc repro` and the paths of their files."""
    from advmoe.evaluation import summary
    from advmoe.threats.extraction import report as extraction
    from advmoe.threats.membership import report as membership
    from advmoe.threats.poisoning import report as poisoning

    poisoning.show_record()
    extraction.show_record()
    membership.show_record()
    summary.show()


@app.command(rich_help_panel=RESULTS)
def findings(
    snapshot: Annotated[str, typer.Argument(help="A git revision, a DVC experiment or a folder.")] = ".",
) -> None:
    """Test the claims of an experiment again, from its decisions per image."""
    from advmoe.reporting import recheck

    recheck.recheck_claims(snapshot)


@app.command(rich_help_panel=RESULTS)
def aggregate(
    snapshots: Annotated[
        list[str] | None,
        typer.Argument(help="Git revisions, DVC experiments or folders; default: all experiments and this folder."),
    ] = None,
) -> None:
    """Test the report's claims over several training seeds, at least three."""
    from advmoe.config import schema
    from advmoe.core.snapshots import open_snapshot
    from advmoe.statistics import aggregation

    claims = schema.load_params().report.claims
    chosen = [open_snapshot(name) for name in snapshots or ()]
    found = aggregation.aggregate(chosen or aggregation.available_snapshots(), claims, require_same_setup=bool(chosen))
    aggregation.write(found, paths.AGGREGATE)
    aggregation.show(found)
    console.info(f"written to {paths.AGGREGATE}; `dvc repro report` includes it in the report")

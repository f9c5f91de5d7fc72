"""Recomputes the claims of a snapshot from its decisions (`advmoe findings`)."""

from advmoe.core.errors import UserError
from advmoe.core.settings import Seed, validate
from advmoe.core.snapshots import open_snapshot, read_params
from advmoe.reporting.config import ReportSection
from advmoe.statistics import claims


def recheck_claims(name: str) -> None:
    """Tests and prints the claims in the params.yaml of a folder, git revision or DVC experiment.

    Raises UserError when the snapshot cannot be read or its params.yaml has no claims.
    """
    snapshot = open_snapshot(name)
    params = read_params(snapshot)
    if "report" not in params:
        raise UserError(f"{snapshot.name}: its params.yaml has no claims (report.claims)")
    section = validate(params["report"], ReportSection, f"{snapshot.name}: params.yaml", "report")
    seed = validate(params.get("seed"), Seed, snapshot.name, "seed")
    claims.show(claims.evaluate_claims(snapshot, section.claims, seed))

"""The claims of a record, judged again from its decisions: what a sceptic runs."""

from advmoe.core.errors import UserError
from advmoe.core.settings import Seed, validate
from advmoe.core.snapshots import open_snapshot, read_params
from advmoe.reporting.config import ReportSection
from advmoe.statistics import claims


def show(where: str) -> None:
    """Judge and print the claims that the record's own params.yaml makes. Raises UserError when it makes none."""
    record = open_snapshot(where)
    params = read_params(record)
    if "report" not in params:
        raise UserError(f"{record.name}: its params.yaml makes no claims (report.claims)")
    section = validate(params["report"], ReportSection, f"{record.name}: params.yaml", "report")
    claims.show(claims.judge(record, section.claims, validate(params.get("seed"), Seed, record.name, "seed")))

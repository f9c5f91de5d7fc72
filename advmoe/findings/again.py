"""The claims of a record, judged again from its decisions: what a sceptic runs."""

from advmoe.errors import UserError
from advmoe.findings import claims
from advmoe.params import Seed, validate
from advmoe.records import open_record, read_params
from advmoe.report.settings import ReportSection


def show(where: str) -> None:
    """Judge and print the claims that the record's own params.yaml makes. Raises UserError when it makes none."""
    record = open_record(where)
    params = read_params(record)
    if "report" not in params:
        raise UserError(f"{record.name}: its params.yaml makes no claims (report.claims)")
    section = validate(params["report"], ReportSection, f"{record.name}: params.yaml", "report")
    claims.show(claims.judge(record, section.claims, validate(params.get("seed"), Seed, record.name, "seed")))

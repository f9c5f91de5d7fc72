"""Results of the membership audit: console table and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from advmoe.core import console, files, paths
from advmoe.threats.membership.metrics import Estimate, MembershipResult
from advmoe.threats.results import read_results

SCHEMA = 1
STORED_KEYS = {"result": "leak", "auc_difference": "beyond"}  # names of fields in the JSON file


@dataclass(frozen=True)
class Row:
    """The result of one victim, score and kind of query; `auc_difference`: AUC minus that of the victim `against`."""

    victim: str
    score: str
    queries: str
    shadows: int
    result: MembershipResult
    auc_difference: Estimate | None


def write(rows: Sequence[Row], about: Mapping[str, Any], summary: Path, runs: Path) -> None:
    """Writes the main metrics by victim, score and queries to `summary`, and all with intervals to `runs`."""
    summaries: dict[str, Any] = {}
    for row in rows:
        numbers = {"auc": row.result.auc.value, "balanced_accuracy": row.result.balanced_accuracy}
        numbers |= {f"tpr_at_{rate}": estimate.value for rate, estimate in row.result.tpr.items()}
        summaries.setdefault(row.victim, {}).setdefault(row.score, {})[row.queries] = numbers
    files.write_json(summary, {"schema_version": SCHEMA, **about, **summaries})
    files.write_json(runs, {"schema_version": SCHEMA, **about, "rows": [_as_json(row) for row in rows]})


def _as_json(row: Row) -> dict[str, Any]:
    return {STORED_KEYS.get(name, name): value for name, value in asdict(row).items()}


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Returns what `write` wrote. Raises UserError when the file was not written by `write`."""
    content = read_results(path, SCHEMA, "rows")
    about = {name: value for name, value in content.items() if name not in {"schema_version", "rows"}}
    return [_row(row) for row in content["rows"]], about


def _row(row: dict[str, Any]) -> Row:
    stored = row["leak"]
    rates = {rate: Estimate(**each) for rate, each in stored["tpr"].items()}
    result = MembershipResult(Estimate(**stored["auc"]), stored["balanced_accuracy"], rates)
    difference = None if row["beyond"] is None else Estimate(**row["beyond"])
    fields = {name: value for name, value in row.items() if name not in {"leak", "beyond"}}
    return Row(**fields, result=result, auc_difference=difference)


def show(rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Prints the table."""
    rates = list(rows[0].result.tpr)
    lines = [
        [
            row.victim,
            row.score,
            row.queries,
            "{:.3f} [{:.3f}, {:.3f}]".format(*astuple(row.result.auc)),
            "" if row.auc_difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*astuple(row.auc_difference)),
            f"{100 * row.result.balanced_accuracy:.1f}",
            *(_percent_cell(row.result.tpr[rate]) for rate in rates),
        ]
        for row in rows
    ]
    titles = ["victim", "score", "queries", "AUC", "AUC difference", "balanced accuracy"]
    note = "" if "0.001" in rates else "; 0.1 % of the non-members is less than one image"
    console.table(
        f"membership: {about['members']} training images, {about['others']} non-members{note}",
        [*titles, *(f"TPR at {100 * float(rate):g} % FPR" for rate in rates)],
        lines,
    )


def _percent_cell(estimate: Estimate) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in astuple(estimate)))


def show_record() -> None:
    """Prints the saved audit, if any."""
    path = paths.metrics("membership", "all")
    if path.exists():
        with files.report_malformed(path):
            show(*read(path))

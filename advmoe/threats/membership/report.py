"""The results of the membership audit: a table and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.threats.membership.attacks import Estimate, Leak

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One victim, score and kind of query: how much it leaks, and how much more than the victim compared with."""

    victim: str
    score: str
    queries: str
    shadows: int
    leak: Leak
    beyond: Estimate | None


def write(rows: Sequence[Row], about: Mapping[str, Any], summary: Path, runs: Path) -> None:
    """The headline by victim, score and queries, and all numbers with their intervals."""
    head: dict[str, Any] = {}
    for row in rows:
        numbers = {"auc": row.leak.auc.value, "balanced_accuracy": row.leak.balanced_accuracy}
        numbers |= {f"tpr_at_{rate}": found.value for rate, found in row.leak.tpr.items()}
        head.setdefault(row.victim, {}).setdefault(row.score, {})[row.queries] = numbers
    files.write_json(summary, {"schema_version": SCHEMA, **about, **head})
    files.write_json(runs, {"schema_version": SCHEMA, **about, "rows": [asdict(row) for row in rows]})


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """What `write` wrote. Raises UserError when the file is not it."""
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA or "rows" not in content:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro`")
    about = {name: value for name, value in content.items() if name not in {"schema_version", "rows"}}
    return [_row(row) for row in content["rows"]], about


def _row(row: dict[str, Any]) -> Row:
    found = row["leak"]
    rates = {rate: Estimate(**each) for rate, each in found["tpr"].items()}
    leak = Leak(Estimate(**found["auc"]), found["balanced_accuracy"], rates)
    beyond = None if row["beyond"] is None else Estimate(**row["beyond"])
    return Row(**(row | {"leak": leak, "beyond": beyond}))


def show(rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Print the table."""
    rates = list(rows[0].leak.tpr)
    lines = [
        [
            row.victim,
            row.score,
            row.queries,
            "{:.3f} [{:.3f}, {:.3f}]".format(*astuple(row.leak.auc)),
            "" if row.beyond is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*astuple(row.beyond)),
            f"{100 * row.leak.balanced_accuracy:.1f}",
            *(_percent(row.leak.tpr[rate]) for rate in rates),
        ]
        for row in rows
    ]
    titles = ["victim", "score", "queries", "AUC", "minus the other's", "balanced accuracy"]
    few = "" if "0.001" in rates else "; 0.1 % of them would be less than one image"
    console.table(
        f"membership: {about['members']} training images against {about['others']} others{few}",
        [*titles, *(f"TPR at {100 * float(rate):g} % FPR" for rate in rates)],
        lines,
    )


def _percent(found: Estimate) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * each for each in astuple(found)))


def show_record() -> None:
    """Print the audit on record; nothing where there is none."""
    path = paths.metrics("membership", "all")
    if path.exists():
        with files.as_written(path):
            show(*read(path))

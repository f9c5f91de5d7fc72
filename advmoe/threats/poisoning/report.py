"""The results of a study: rows, their means over seeds, tables, JSON and plot data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.statistics.intervals import Share
from advmoe.threats.results import as_json, from_json, mean
from advmoe.threats.results import over_runs as mean_over

SCHEMA = 1
RUNS = "poison-runs"  # the folder of metrics/ with every single run
COLUMNS = {  # of the table, those that a study has; with their intervals
    "clean_acc": "clean",
    "robust_acc": "PGD",
    "asr": "ASR",
    "trigger_recovery_acc": "recovered",
    "source_to_target": "source to target",
    "success": "targets hit",
    "tpr": "TPR",
    "fpr": "FPR",
}
BESIDE = {  # what stands beside a column, in brackets, without its interval
    "clean_acc": "d_clean_acc",
    "robust_acc": "d_robust_acc",
    "asr": "asr_clean_twin",
    "source_to_target": "source_to_target_clean_twin",
    "success": "success_clean_twin",
}
AMOUNTS = ("n_poison", "rate_of", "share_of_set", "share_of_target_class", "sha256")
MEANING = {"mixture-joint": "mixture, joint phase only (weaker threat)"}


@dataclass(frozen=True)
class Row:
    """One victim of one poisoned set: what was measured, and how much was poisoned. `defence`: empty for none."""

    victim: str
    rate: float
    added: int
    trial: int
    defence: str
    found: dict[str, Any]
    amounts: dict[str, Any]


def sentence(row: Row) -> str:
    """What came out for one victim, in a line of a log."""
    parts = [f"{title} {row.found[name]}" for name, title in COLUMNS.items() if name in row.found]
    after = f" after {row.defence}" if row.defence else ""
    return f"{row.victim}{after}, rate {row.rate:g}, seed + {row.added}: {', '.join(parts)}"


def read(path: Path) -> tuple[str, list[Row], int]:
    """Attack, rows and number of test images of a study on record. Raises UserError when the file is not one."""
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA or "runs" not in content:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro`")
    return content["attack"], [_row(run) for run in content["runs"]], content["images"]


def _row(run: Mapping[str, Any]) -> Row:
    who = {name: run[name] for name in ("victim", "rate", "trial", "defence")}
    amounts = {name: run[name] for name in AMOUNTS if name in run}
    found = {name: from_json(number) for name, number in run.items() if name not in {*who, *amounts, "seed"}}
    return Row(**who, added=run["seed"], found=found, amounts=amounts)


def groups(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Rows that differ in seed and trial only, in order."""
    found: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.victim, row.rate, row.defence), []).append(row)
    return found


def over_runs(rows: Sequence[Row], name: str) -> Any:
    """A metric of rows that differ in seed and trial: with its interval for one run, else the mean with its range.

    Hits of targets, one image each, are pooled instead: ten targets make one rate.
    """
    numbers = [row.found[name] for row in rows]
    if len(numbers) > 1 and name.startswith("success"):
        return Share.pooled(numbers)
    return mean_over(numbers)


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """By victim, rate and metric the mean over seeds and trials, for `dvc metrics`."""
    found: dict[str, Any] = {}
    for (victim, rate, defence), members in groups(rows).items():
        who = f"{victim}, {defence}" if defence else victim
        means = {name: mean(over_runs(members, name)) for name in members[0].found}
        found.setdefault(who, {})[f"{rate:g}"] = means
    return found


def write(rows: Sequence[Row], about: Mapping[str, Any], summary: Path, runs: Path, plots: Path) -> None:
    """The headline, every single run with its intervals, and ASR (or what the attack has in its place) against rate."""
    files.write_json(summary, {"schema_version": SCHEMA, **about, **headline(rows)})
    files.write_json(
        runs,
        {
            "schema_version": SCHEMA,
            **about,
            "runs": [
                {
                    "victim": row.victim,
                    "rate": row.rate,
                    "seed": row.added,
                    "trial": row.trial,
                    "defence": row.defence,
                    **row.amounts,
                    **as_json(row.found),
                }
                for row in rows
            ],
        },
    )
    files.write_csv(plots, curve(rows))


def curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each rate; columns `METRIC VICTIM`."""
    lines: dict[float, dict[str, Any]] = {}
    for (victim, rate, defence), members in groups(rows).items():
        if not defence:
            line = lines.setdefault(rate, {"rate": rate})
            line |= {f"{name} {victim}": mean(over_runs(members, name)) for name in members[0].found}
    return [lines[rate] for rate in sorted(lines)]


def show(name: str, rows: Sequence[Row], images: int) -> None:
    """Print the table of a study."""
    columns = [key for key in COLUMNS if any(key in row.found for row in rows)]
    defended = any(row.defence for row in rows)
    lines = []
    for (victim, rate, defence), members in groups(rows).items():
        who = [MEANING.get(victim, victim), f"{rate:g}", *([defence or "none"] if defended else [])]
        lines.append([*who, *(_cell(members, key) for key in columns)])
    titles = ["victim", "rate", *(["defence"] if defended else []), *(_title(key) for key in columns)]
    of = rows[0].amounts["rate_of"]
    console.table(f"{name}: % on {images} test images; rates are shares of {of}; {_runs(rows)}", titles, lines)


def _runs(rows: Sequence[Row]) -> str:
    """How often each victim was trained, and what the brackets therefore mean."""
    seeds, targets = (len({getattr(row, name) for row in rows}) for name in ("added", "trial"))
    trained = "one seed" if seeds == 1 else f"{seeds} seeds"
    if targets > 1:
        trained += f", {targets} targets"
    return f"{trained}, " + ("95 % intervals over images" if seeds * targets == 1 else "mean (lowest to highest)")


def show_record() -> None:
    """Print the tables of all studies on record; nothing where there are none."""
    for path in sorted((paths.METRICS / RUNS).glob("*.json")):
        with files.as_written(path):
            _, rows, images = read(path)
            show(f"poison@{path.stem}", rows, images)


def _title(key: str) -> str:
    beside = BESIDE.get(key, "")
    what = " (minus twin)" if beside.startswith("d_") else " (twin)" if beside else ""
    return COLUMNS[key] + what


def _cell(members: Sequence[Row], key: str) -> str:
    if key not in members[0].found:
        return ""
    number = str(over_runs(members, key))
    if key not in BESIDE:
        return number
    beside = 100 * mean(over_runs(members, BESIDE[key]))
    return f"{number} ({beside:+.1f})" if BESIDE[key].startswith("d_") else f"{number} ({beside:.1f})"

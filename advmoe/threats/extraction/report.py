"""The results of an extraction study: rows, tables, JSON and plot data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.threats.results import as_json, from_json, mean, over_runs

SCHEMA = 1
RUNS = "extract-runs"  # the folder of metrics/ with every single run
CONTROL = "none"  # what the control was told
COLUMNS = {
    "task_acc": "accuracy",
    "fidelity": "fidelity",
    "surrogate_robust_acc": "PGD accuracy",
    "robust_fidelity": "PGD fidelity",
    "transfer_asr": "transfer ASR",
}
BESIDE = {"task_acc": "d_task_acc", "fidelity": "d_fidelity", "transfer_asr": "d_transfer_asr"}  # minus control
WHO = ("victim", "answers", "surrogate", "budget", "seed")
HONEST = ("honest_alarm_after", "honest_queries", "honest_acc", "honest_distance")
AMOUNTS = ("queries_used", "sha256", "alarm_after", *HONEST)


@dataclass(frozen=True)
class Row:
    """One surrogate: whose answers it learned, at which budget (0: the control), what was measured, at what cost."""

    victim: str
    answers: str
    surrogate: str
    budget: int
    added: int
    found: dict[str, Any]
    amounts: dict[str, Any]


def sentence(row: Row) -> str:
    """What came out for one surrogate, in a line of a log."""
    parts = [f"{title} {row.found[name]}" for name, title in COLUMNS.items() if name in row.found]
    return f"{row.victim}, {row.answers}, {row.surrogate}, {row.budget} queries, seed + {row.added}: {', '.join(parts)}"


def write(rows: Sequence[Row], about: Mapping[str, Any], summary: Path, runs: Path, plots: Path) -> None:
    """The headline, every single run with its intervals, and every number against the queries."""
    files.write_json(summary, {"schema_version": SCHEMA, **about, **headline(rows)})
    content = [{**dict(zip(WHO, _who(row), strict=True)), **as_json(row.amounts), **as_json(row.found)} for row in rows]
    files.write_json(runs, {"schema_version": SCHEMA, **about, "runs": content})
    files.write_csv(plots, curve(rows))


def _who(row: Row) -> tuple[Any, ...]:
    return row.victim, row.answers, row.surrogate, row.budget, row.added


def read(path: Path) -> tuple[list[Row], int]:
    """Rows and number of test images of a study on record. Raises UserError when the file is not one."""
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA or "runs" not in content:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro`")
    return [_row(run) for run in content["runs"]], content["images"]


def _row(run: Mapping[str, Any]) -> Row:
    amounts = {name: from_json(run[name]) for name in AMOUNTS if name in run}
    found = {name: from_json(number) for name, number in run.items() if name not in {*WHO, *AMOUNTS}}
    return Row(run["victim"], run["answers"], run["surrogate"], run["budget"], run["seed"], found, amounts)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str, int], list[Row]]:
    """Rows that differ in seed only, in order."""
    found: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.victim, row.answers, row.surrogate, row.budget), []).append(row)
    return found


def _means(members: Sequence[Row]) -> dict[str, float]:
    shared = [name for name in members[0].found if all(name in row.found for row in members)]
    return {name: mean(over_runs([row.found[name] for row in members])) for name in shared}


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """By victim, answers, surrogate, queries and metric the mean over seeds, for `dvc metrics`."""
    found: dict[str, Any] = {}
    for (victim, answers, surrogate, budget), members in groups(rows).items():
        place = found.setdefault(victim, {}).setdefault(answers, {}).setdefault(surrogate, {})
        place[str(budget)] = _means(members)
    return found


def curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each number of queries, 0 being the control; columns `METRIC VICTIM ANSWERS SURROGATE`."""
    lines: dict[int, dict[str, Any]] = {}
    by_group = groups(rows)
    for (victim, answers, surrogate, budget), members in by_group.items():
        if answers == CONTROL:
            continue
        for queries, those in ((0, by_group[victim, CONTROL, surrogate, 0]), (budget, members)):
            means = _means(those)
            line = lines.setdefault(queries, {"queries": queries})
            line |= {f"{name} {victim} {answers} {surrogate}": means.get(name, "") for name in _means(members)}
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    return [{name: lines[queries].get(name, "") for name in columns} for queries in sorted(lines)]


def show(name: str, rows: Sequence[Row], images: int) -> None:
    """Print the tables of a study."""
    columns = [key for key in COLUMNS if any(key in row.found for row in rows)]
    lines = [
        [victim, answers, surrogate, str(budget), *(_cell(members, key) for key in columns)]
        for (victim, answers, surrogate, budget), members in groups(rows).items()
    ]
    titles = ["victim", "told", "surrogate", "queries", *(_title(key) for key in columns)]
    console.table(f"{name}: % on {images} test images; told '{CONTROL}': the control; {_runs(rows)}", titles, lines)
    console.table("transfer to the victim, % of the images it gets right", *_transfer(rows))
    console.table("what the answers cost an honest user, and when PRADA raises the alarm (queries)", *_cost(rows))


def _runs(rows: Sequence[Row]) -> str:
    seeds = len({row.added for row in rows})
    return "one seed, 95 % intervals over images" if seeds == 1 else f"{seeds} seeds, mean (lowest to highest)"


def _title(key: str) -> str:
    return COLUMNS[key] + (" (minus control)" if key in BESIDE else "")


def _cell(members: Sequence[Row], key: str) -> str:
    if not all(key in row.found for row in members):
        return ""
    number = str(over_runs([row.found[key] for row in members]))
    beside = BESIDE.get(key)
    if beside is None or not all(beside in row.found for row in members):
        return number
    return f"{number} ({100 * mean(over_runs([row.found[beside] for row in members])):+.1f})"


def _transfer(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """For every victim what its strongest surrogate gets, between random signs and the white box."""
    lines = []
    for victim in dict.fromkeys(row.victim for row in rows):
        mine = [row for row in rows if row.victim == victim and "transfer_asr" in row.found]
        if not mine:
            continue
        control = [row for row in mine if row.answers == CONTROL]
        bought = [row for row in mine if row.answers != CONTROL]
        best = max(bought, key=lambda row: row.found["transfer_asr"].accuracy)
        free = max(control, key=lambda row: row.found["transfer_asr"].accuracy)
        strongest = f"strongest of {len(bought)}: {best.answers}, {best.surrogate}, {best.budget} queries"
        ends = [str(best.found[name]) if name in best.found else "" for name in ("random_sign_asr", "white_box_asr")]
        shares = [str(free.found["transfer_asr"]), str(best.found["transfer_asr"])]
        lines.append([victim, ends[0], *shares, ends[1], strongest])
    return ["victim", "random signs", "control", "surrogate", "white box", "which surrogate"], lines


def _cost(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines = {}
    for row in rows:
        if row.amounts:
            amounts = row.amounts
            thief = _alarm(amounts["alarm_after"], amounts["queries_used"])
            honest = _alarm(amounts["honest_alarm_after"], amounts["honest_queries"])
            distance = f"{amounts['honest_distance']:.3f}"
            # the largest budget comes last; other seeds tell the same story
            lines[row.victim, row.answers] = [
                row.victim,
                row.answers,
                str(amounts["honest_acc"]),
                distance,
                thief,
                honest,
            ]
    return ["victim", "told", "accuracy", "confidences off by", "alarm, thief", "alarm, honest"], list(lines.values())


def _alarm(after: int | None, queries: int) -> str:
    return f"never in {queries}" if after is None else f"{after} of {queries}"


def show_record() -> None:
    """Print the tables of all studies on record; nothing where there are none."""
    for path in sorted((paths.METRICS / RUNS).glob("*.json")):
        with files.as_written(path):
            rows, images = read(path)
            show(f"extract@{path.stem}", rows, images)

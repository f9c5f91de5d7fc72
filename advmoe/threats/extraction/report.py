"""Results of an extraction study: table rows, console tables, JSON and plot data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import console, files, paths
from advmoe.threats.results import aggregate_runs, as_json, from_json, mean, read_results

SCHEMA = 1
RUNS = "extract-runs"  # folder under metrics/ with all single runs
CONTROL = "none"  # answer mode of the control
COLUMNS = {
    "task_acc": "accuracy",
    "fidelity": "fidelity",
    "surrogate_robust_acc": "PGD accuracy",
    "robust_fidelity": "PGD fidelity",
    "transfer_asr": "transfer ASR",
}
CONTROL_DIFFERENCES = {  # metric minus that of the control
    "task_acc": "d_task_acc",
    "fidelity": "d_fidelity",
    "transfer_asr": "d_transfer_asr",
}
RUN_KEYS = ("victim", "answers", "surrogate", "budget", "seed")
BENIGN_KEYS = ("honest_alarm_after", "honest_queries", "honest_acc", "honest_distance")
QUERY_KEYS = ("queries_used", "sha256", "alarm_after", *BENIGN_KEYS)


@dataclass(frozen=True)
class Row:
    """The results of one surrogate. `answers`: answer mode; `budget`: 0 for the control; `seed_offset`: added to the
    project's seed; `query_stats`: queries used, the detector's alarms and the costs for benign users.
    """

    victim: str
    answers: str
    surrogate: str
    budget: int
    seed_offset: int
    metrics: dict[str, Any]
    query_stats: dict[str, Any]


def summary_line(row: Row) -> str:
    """Returns the main metrics of one surrogate as a log line."""
    parts = [f"{title} {row.metrics[name]}" for name, title in COLUMNS.items() if name in row.metrics]
    run = f"{row.victim}, {row.answers}, {row.surrogate}, {row.budget} queries, seed + {row.seed_offset}"
    return f"{run}: {', '.join(parts)}"


def write(rows: Sequence[Row], about: Mapping[str, Any], summary: Path, runs: Path, plots: Path) -> None:
    """Writes means over seeds to `summary`, all runs with intervals to `runs`, and metrics by queries to `plots`."""
    files.write_json(summary, {"schema_version": SCHEMA, **about, **mean_metrics(rows)})
    content = [
        {**dict(zip(RUN_KEYS, _run_values(row), strict=True)), **as_json(row.query_stats), **as_json(row.metrics)}
        for row in rows
    ]
    files.write_json(runs, {"schema_version": SCHEMA, **about, "runs": content})
    files.write_csv(plots, curve(rows))


def _run_values(row: Row) -> tuple[Any, ...]:
    return row.victim, row.answers, row.surrogate, row.budget, row.seed_offset


def read(path: Path) -> tuple[list[Row], int]:
    """Returns the rows and the number of test images. Raises UserError when the file was not written by `write`."""
    content = read_results(path, SCHEMA, "runs")
    return [_row(run) for run in content["runs"]], content["images"]


def _row(run: Mapping[str, Any]) -> Row:
    query_stats = {name: from_json(run[name]) for name in QUERY_KEYS if name in run}
    metrics = {name: from_json(number) for name, number in run.items() if name not in {*RUN_KEYS, *QUERY_KEYS}}
    return Row(run["victim"], run["answers"], run["surrogate"], run["budget"], run["seed"], metrics, query_stats)


def group_over_seeds(rows: Sequence[Row]) -> dict[tuple[str, str, str, int], list[Row]]:
    """Groups rows that differ in the seed only; keeps the order."""
    grouped: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.victim, row.answers, row.surrogate, row.budget), []).append(row)
    return grouped


def _means(members: Sequence[Row]) -> dict[str, float]:
    shared = [name for name in members[0].metrics if all(name in row.metrics for row in members)]
    return {name: mean(aggregate_runs([row.metrics[name] for row in members])) for name in shared}


def mean_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the means over seeds, nested by victim, answers, surrogate, budget and metric, for `dvc metrics`."""
    means: dict[str, Any] = {}
    for (victim, answers, surrogate, budget), members in group_over_seeds(rows).items():
        by_budget = means.setdefault(victim, {}).setdefault(answers, {}).setdefault(surrogate, {})
        by_budget[str(budget)] = _means(members)
    return means


def curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns one row per number of queries (0: the control) with columns `METRIC VICTIM ANSWERS SURROGATE`."""
    lines: dict[int, dict[str, Any]] = {}
    by_group = group_over_seeds(rows)
    for (victim, answers, surrogate, budget), members in by_group.items():
        if answers == CONTROL:
            continue
        for queries, runs in ((0, by_group[victim, CONTROL, surrogate, 0]), (budget, members)):
            means = _means(runs)
            line = lines.setdefault(queries, {"queries": queries})
            line |= {f"{name} {victim} {answers} {surrogate}": means.get(name, "") for name in _means(members)}
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    return [{name: lines[queries].get(name, "") for name in columns} for queries in sorted(lines)]


def show(name: str, rows: Sequence[Row], images: int) -> None:
    """Prints the tables of a study."""
    columns = [key for key in COLUMNS if any(key in row.metrics for row in rows)]
    lines = [
        [victim, answers, surrogate, str(budget), *(_cell(members, key) for key in columns)]
        for (victim, answers, surrogate, budget), members in group_over_seeds(rows).items()
    ]
    titles = ["victim", "answers", "surrogate", "queries", *(_title(key) for key in columns)]
    console.table(
        f"{name}: % on {images} test images; answers '{CONTROL}': the control; {_seeds_note(rows)}", titles, lines
    )
    console.table("transfer to the victim, % of the images that it classifies correctly", *_transfer_table(rows))
    console.table("costs of an answer mode for a benign user, and queries until PRADA's alarm", *_defence_table(rows))


def _seeds_note(rows: Sequence[Row]) -> str:
    seeds = len({row.seed_offset for row in rows})
    return "one seed, 95 % intervals over images" if seeds == 1 else f"{seeds} seeds, mean (lowest to highest)"


def _title(key: str) -> str:
    return COLUMNS[key] + (" (minus control)" if key in CONTROL_DIFFERENCES else "")


def _cell(members: Sequence[Row], key: str) -> str:
    if not all(key in row.metrics for row in members):
        return ""
    number = str(aggregate_runs([row.metrics[key] for row in members]))
    difference = CONTROL_DIFFERENCES.get(key)
    if difference is None or not all(difference in row.metrics for row in members):
        return number
    return f"{number} ({100 * mean(aggregate_runs([row.metrics[difference] for row in members])):+.1f})"


def _transfer_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One line per victim: its strongest surrogate, between random signs and the white-box attack."""
    lines = []
    for victim in dict.fromkeys(row.victim for row in rows):
        victim_rows = [row for row in rows if row.victim == victim and "transfer_asr" in row.metrics]
        if not victim_rows:
            continue
        controls = [row for row in victim_rows if row.answers == CONTROL]
        surrogates = [row for row in victim_rows if row.answers != CONTROL]
        best = max(surrogates, key=lambda row: row.metrics["transfer_asr"].accuracy)
        best_control = max(controls, key=lambda row: row.metrics["transfer_asr"].accuracy)
        strongest = f"{best.answers}, {best.surrogate}, {best.budget} queries (best of {len(surrogates)})"
        ends = [
            str(best.metrics[name]) if name in best.metrics else "" for name in ("random_sign_asr", "white_box_asr")
        ]
        shares = [str(best_control.metrics["transfer_asr"]), str(best.metrics["transfer_asr"])]
        lines.append([victim, ends[0], *shares, ends[1], strongest])
    return ["victim", "random signs", "control", "surrogate", "white box", "strongest surrogate"], lines


def _defence_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines = {}
    for row in rows:
        if row.query_stats:
            stats = row.query_stats
            attack_alarm = _alarm_cell(stats["alarm_after"], stats["queries_used"])
            benign_alarm = _alarm_cell(stats["honest_alarm_after"], stats["honest_queries"])
            distance = f"{stats['honest_distance']:.3f}"
            # keeps the last row: the largest budget of the last seed
            lines[row.victim, row.answers] = [
                row.victim,
                row.answers,
                str(stats["honest_acc"]),
                distance,
                attack_alarm,
                benign_alarm,
            ]
    return ["victim", "answers", "accuracy", "total variation", "alarm, attack", "alarm, benign"], list(lines.values())


def _alarm_cell(after: int | None, queries: int) -> str:
    return f"never in {queries}" if after is None else f"{after} of {queries}"


def show_record() -> None:
    """Prints the tables of all saved studies, if any."""
    for path in sorted((paths.METRICS / RUNS).glob("*.json")):
        with files.report_malformed(path):
            rows, images = read(path)
            show(f"extract@{path.stem}", rows, images)

"""Results of a poisoning study: rows, means over seeds, tables, JSON and plot data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import console, files, paths
from advmoe.statistics.intervals import Proportion
from advmoe.threats.results import aggregate_runs, as_json, from_json, mean, read_results

SCHEMA = 1
RUNS = "poison-runs"  # the folder in metrics/ with the results of every run
COLUMNS = {  # metric: title in the table, where a study has the metric; shown with its interval
    "clean_acc": "clean",
    "robust_acc": "PGD",
    "asr": "ASR",
    "trigger_recovery_acc": "recovered",
    "source_to_target": "source to target",
    "success": "targets hit",
    "tpr": "TPR",
    "fpr": "FPR",
}
BRACKETED = {  # metric: metric that is shown in brackets after it, without its interval
    "clean_acc": "d_clean_acc",
    "robust_acc": "d_robust_acc",
    "asr": "asr_clean_twin",
    "source_to_target": "source_to_target_clean_twin",
    "success": "success_clean_twin",
}
AMOUNTS = ("n_poison", "rate_of", "share_of_set", "share_of_target_class", "sha256")
VICTIM_TITLES = {"mixture-joint": "mixture, joint phase only (weaker threat)"}


@dataclass(frozen=True)
class Row:
    """Metrics of one victim of one poisoned set. `defence`: empty for none; `amounts`: how much was poisoned."""

    victim: str
    rate: float
    seed_offset: int
    trial: int
    defence: str
    metrics: dict[str, Any]
    amounts: dict[str, Any]


def summary_line(row: Row) -> str:
    """Returns the result of one victim as a line for the log."""
    parts = [f"{title} {row.metrics[name]}" for name, title in COLUMNS.items() if name in row.metrics]
    after = f" after {row.defence}" if row.defence else ""
    return f"{row.victim}{after}, rate {row.rate:g}, seed + {row.seed_offset}: {', '.join(parts)}"


def read(path: Path) -> tuple[str, list[Row], int]:
    """Reads attack, rows and number of test images of a study. Raises UserError for any other file."""
    content = read_results(path, SCHEMA, "runs")
    return content["attack"], [_row(run) for run in content["runs"]], content["images"]


def _row(run: Mapping[str, Any]) -> Row:
    key = {name: run[name] for name in ("victim", "rate", "trial", "defence")}
    amounts = {name: run[name] for name in AMOUNTS if name in run}
    metrics = {name: from_json(value) for name, value in run.items() if name not in {*key, *amounts, "seed"}}
    return Row(**key, seed_offset=run["seed"], metrics=metrics, amounts=amounts)


def group_rows(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Returns lists of rows that differ in seed and trial only, by (victim, rate, defence), in order."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.victim, row.rate, row.defence), []).append(row)
    return groups


def aggregate_metric(rows: Sequence[Row], name: str) -> Any:
    """Returns a metric of rows that differ in seed and trial: see `advmoe.threats.results.aggregate_runs`.

    Success on target images, one per trial, is pooled instead: ten trials give one rate.
    """
    numbers = [row.metrics[name] for row in rows]
    if len(numbers) > 1 and name.startswith("success"):
        return Proportion.pooled(numbers)
    return aggregate_runs(numbers)


def mean_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns means over seeds and trials by victim, rate and metric, for `dvc metrics`."""
    means: dict[str, Any] = {}
    for (victim, rate, defence), members in group_rows(rows).items():
        key = f"{victim}, {defence}" if defence else victim
        by_metric = {name: mean(aggregate_metric(members, name)) for name in members[0].metrics}
        means.setdefault(key, {})[f"{rate:g}"] = by_metric
    return means


def write(rows: Sequence[Row], about: Mapping[str, Any], summary: Path, runs: Path, plots: Path) -> None:
    """Writes means to `summary`, every run with its intervals to `runs`, and metrics against the rate to `plots`."""
    content = [
        {
            "victim": row.victim,
            "rate": row.rate,
            "seed": row.seed_offset,
            "trial": row.trial,
            "defence": row.defence,
            **row.amounts,
            **as_json(row.metrics),
        }
        for row in rows
    ]
    files.write_json(summary, {"schema_version": SCHEMA, **about, **mean_metrics(rows)})
    files.write_json(runs, {"schema_version": SCHEMA, **about, "runs": content})
    files.write_csv(plots, curve(rows))


def curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns one line per rate with columns `METRIC VICTIM`, of victims without defence."""
    lines: dict[float, dict[str, Any]] = {}
    for (victim, rate, defence), members in group_rows(rows).items():
        if not defence:
            line = lines.setdefault(rate, {"rate": rate})
            line |= {f"{name} {victim}": mean(aggregate_metric(members, name)) for name in members[0].metrics}
    return [lines[rate] for rate in sorted(lines)]


def show(name: str, rows: Sequence[Row], images: int) -> None:
    """Prints the table of a study."""
    columns = [key for key in COLUMNS if any(key in row.metrics for row in rows)]
    defended = any(row.defence for row in rows)
    lines = []
    for (victim, rate, defence), members in group_rows(rows).items():
        labels = [VICTIM_TITLES.get(victim, victim), f"{rate:g}", *([defence or "none"] if defended else [])]
        lines.append([*labels, *(_cell(members, key) for key in columns)])
    titles = ["victim", "rate", *(["defence"] if defended else []), *(_title(key) for key in columns)]
    rate_of = rows[0].amounts["rate_of"]
    console.table(f"{name}: % on {images} test images; rates are shares of {rate_of}; {_runs(rows)}", titles, lines)


def _runs(rows: Sequence[Row]) -> str:
    """Number of seeds and targets, and the meaning of the ranges in the table."""
    seeds, targets = (len({getattr(row, name) for row in rows}) for name in ("seed_offset", "trial"))
    trained = "one seed" if seeds == 1 else f"{seeds} seeds"
    if targets > 1:
        trained += f", {targets} targets"
    return f"{trained}, " + ("95 % intervals over images" if seeds * targets == 1 else "mean (lowest to highest)")


def show_record() -> None:
    """Prints the tables of all studies with results in metrics/."""
    for path in sorted((paths.METRICS / RUNS).glob("*.json")):
        with files.report_malformed(path):
            _, rows, images = read(path)
            show(f"poison@{path.stem}", rows, images)


def _title(key: str) -> str:
    bracketed = BRACKETED.get(key, "")
    suffix = " (minus twin)" if bracketed.startswith("d_") else " (twin)" if bracketed else ""
    return COLUMNS[key] + suffix


def _cell(members: Sequence[Row], key: str) -> str:
    if key not in members[0].metrics:
        return ""
    number = str(aggregate_metric(members, key))
    if key not in BRACKETED:
        return number
    bracketed = 100 * mean(aggregate_metric(members, BRACKETED[key]))
    return f"{number} ({bracketed:+.1f})" if BRACKETED[key].startswith("d_") else f"{number} ({bracketed:.1f})"

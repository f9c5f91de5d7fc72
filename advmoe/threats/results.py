"""Results of threat experiments: JSON files, conversion of metrics to and from JSON, and aggregation over runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import PairedDifference

DIGITS = 6


def value(number: Any) -> float:
    """Returns a metric as a plain number, without its interval."""
    match number:
        case Proportion():
            return number.accuracy
        case PairedDifference():
            return number.difference
    return float(number)


def as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics by name with their intervals, ready for JSON."""
    return {
        name: number.as_dict() if isinstance(number, Proportion | PairedDifference) else number
        for name, number in metrics.items()
    }


def from_json(content: Any) -> Any:
    """Returns one metric from the value that `as_json` wrote."""
    if not isinstance(content, dict):
        return content
    return Proportion(**content) if "accuracy" in content else PairedDifference(**content)


def read_results(path: Path, schema: int, key: str) -> dict[str, Any]:
    """Reads a JSON file of results. Raises UserError unless it has this schema version and this key."""
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != schema or key not in content:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro`")
    return content


@dataclass(frozen=True)
class MeanRange:
    """Mean, lowest and highest value over a number of `runs`."""

    mean: float
    lowest: float
    highest: float
    runs: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.lowest:.1f} to {100 * self.highest:.1f})"


def aggregate_runs(numbers: Sequence[Any]) -> Any:
    """Returns a single run's metric unchanged, with its interval, and for several runs the mean with its range."""
    if len(numbers) == 1:
        return numbers[0]
    values = [value(number) for number in numbers]
    return MeanRange(sum(values) / len(values), min(values), max(values), len(values))


def mean(number: Any) -> float:
    """Returns a value of `aggregate_runs` as a plain rounded number."""
    return round(number.mean if isinstance(number, MeanRange) else value(number), DIGITS)

"""Numbers of studies: with their intervals, as JSON and back, and their means over runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import PairedDifference

DIGITS = 6


def value(number: Any) -> float:
    """The number itself, without its interval."""
    match number:
        case Share():
            return number.accuracy
        case PairedDifference():
            return number.difference
    return float(number)


def as_json(found: Mapping[str, Any]) -> dict[str, Any]:
    """With intervals, for JSON."""
    return {
        name: number.as_dict() if isinstance(number, Share | PairedDifference) else number
        for name, number in found.items()
    }


def from_json(content: Any) -> Any:
    """What `as_json` wrote for one number."""
    if not isinstance(content, dict):
        return content
    return Share(**content) if "accuracy" in content else PairedDifference(**content)


@dataclass(frozen=True)
class Spread:
    """The mean over `runs`, and the lowest and highest of them."""

    mean: float
    lowest: float
    highest: float
    runs: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.lowest:.1f} to {100 * self.highest:.1f})"


def over_runs(numbers: Sequence[Any]) -> Any:
    """One number of several runs: as it is, with its interval, for a single run, else the mean with its range."""
    if len(numbers) == 1:
        return numbers[0]
    values = [value(number) for number in numbers]
    return Spread(sum(values) / len(values), min(values), max(values), len(values))


def mean(number: Any) -> float:
    """What `over_runs` returned, as a plain number."""
    return round(number.mean if isinstance(number, Spread) else value(number), DIGITS)

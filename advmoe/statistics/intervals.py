"""Proportions such as accuracies, with Wilson 95 % confidence intervals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Proportion:
    """`correct` of `total` images, with the Wilson 95 % interval [low, high] of `accuracy`, all in [0, 1]."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def from_mask(cls, correct_N: torch.Tensor) -> "Proportion":
        """Counts a bool tensor (N,), N > 0."""
        return cls.from_counts(int(correct_N.sum()), len(correct_N))

    @classmethod
    def from_counts(cls, correct: int, total: int) -> "Proportion":
        """Rounds accuracy and interval to six digits. Raises ValueError unless 0 <= correct <= total and total > 0."""
        low, high = wilson_interval(correct, total)
        return cls(correct, total, round(correct / total, 6), round(low, 6), round(high, 6))

    @classmethod
    def pooled(cls, proportions: Sequence["Proportion"]) -> "Proportion":
        """Pools the counts of disjoint sets of images."""
        return cls.from_counts(sum(each.correct for each in proportions), sum(each.total for each in proportions))

    def as_dict(self) -> dict[str, float]:
        """Returns the proportion for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion at 95 % (Wilson 1927), inside [0, 1].

    Raises ValueError unless 0 <= correct <= total and total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is not a proportion")
    from scipy.stats import binomtest  # noqa: PLC0415  (takes more than a second)

    interval = binomtest(correct, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)

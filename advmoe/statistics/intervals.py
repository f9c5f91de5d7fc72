"""Intervals for accuracies."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

Z95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal


@dataclass(frozen=True)
class Share:
    """`correct` of `total` images, with the Wilson 95 % interval [low, high]."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, correct_N: torch.Tensor) -> "Share":
        """From a bool tensor (N,), N > 0."""
        return cls.counted(int(correct_N.sum()), len(correct_N))

    @classmethod
    def pooled(cls, shares: Sequence["Share"]) -> "Share":
        """Of disjoint sets of images together."""
        return cls.counted(sum(share.correct for share in shares), sum(share.total for share in shares))

    @classmethod
    def counted(cls, correct: int, total: int) -> "Share":
        """From counts."""
        low, high = wilson(correct, total)
        return cls(correct, total, round(correct / total, 6), round(low, 6), round(high, 6))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson score interval at 95 % for a share (Wilson 1927): never outside [0, 1], sound near both ends."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is no share")
    share, z2 = correct / total, Z95 * Z95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)

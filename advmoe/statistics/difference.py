"""Differences of an accuracy between two runs, with 95 % intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import compare_paired

BOOTSTRAP_SEED = 0  # fixed, so that the intervals of a comparison are reproducible

Pair = tuple[bool, bool]


@dataclass(frozen=True)
class Difference:
    """Second accuracy minus first, with its 95 % interval [low, high] and the method that gave it."""

    difference: float
    low: float
    high: float
    method: str

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def paired_difference(pairs: Sequence[Pair]) -> Difference:
    """Returns the difference with a paired bootstrap interval.

    `pairs` holds, per image, whether the first and the second run classify it correctly; at least one image.
    """
    first_N, second_N = torch.tensor(pairs, dtype=torch.bool).unbind(1)
    paired = compare_paired(second_N, first_N, BOOTSTRAP_SEED)
    return Difference(paired.difference, paired.low, paired.high, f"paired, {len(pairs)} images")


def unpaired_difference(first: Proportion, second: Proportion) -> Difference:
    """Returns the difference of two independent proportions with its hybrid score interval.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10, which combines
    the two Wilson intervals.
    """
    difference = second.accuracy - first.accuracy
    below = math.hypot(second.accuracy - second.low, first.high - first.accuracy)
    above = math.hypot(second.high - second.accuracy, first.accuracy - first.low)
    return Difference(round(difference, 6), round(difference - below, 6), round(difference + above, 6), "unpaired")

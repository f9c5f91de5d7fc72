"""How far an accuracy moved between two runs, and whether further than their intervals allow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import compare

BOOTSTRAP = 0  # seed: the intervals of a comparison must not change from one reading to the next

Pair = tuple[bool, bool]


@dataclass(frozen=True)
class Difference:
    """Second accuracy minus first, with its 95 % interval, and how that was found."""

    difference: float
    low: float
    high: float
    how: str

    @property
    def moved(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def on_same_images(pairs: Sequence[Pair]) -> Difference:
    """From whether the first and the second run got each image right: paired bootstrap, at least one image."""
    first_N, second_N = torch.tensor(pairs, dtype=torch.bool).unbind(1)
    found = compare(second_N, first_N, BOOTSTRAP)
    return Difference(found.difference, found.low, found.high, f"paired, {len(pairs)} images")


def on_other_images(first: Share, second: Share) -> Difference:
    """From two independent shares: the hybrid score interval of their difference (Newcombe 1998, "Interval estimation
    for the difference between independent proportions", method 10), which joins the two Wilson intervals.
    """
    difference = second.accuracy - first.accuracy
    below = math.hypot(second.accuracy - second.low, first.high - first.accuracy)
    above = math.hypot(second.high - second.accuracy, first.accuracy - first.low)
    return Difference(round(difference, 6), round(difference - below, 6), round(difference + above, 6), "unpaired")

"""Paired comparison of two classifiers on the same images: bootstrap interval and exact McNemar test."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from advmoe.runtime.machine import generator

RESAMPLES = 2000  # of the bootstrap: the ends of the interval then vary by a few hundredths of a point at most
TAIL = 0.025  # on each side of the 95 % interval


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two accuracies on the same images.

    `difference`: accuracy of the first minus the second, with its paired 95 % bootstrap interval [low, high];
    `only_first`, `only_second`: numbers of images that only one of them classifies correctly; `p`: exact McNemar test,
    two-sided.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """Returns the difference for JSON."""
        return asdict(self)


def compare_paired(first_N: Tensor, second_N: Tensor, seed: int) -> PairedDifference:
    """Compares two bool tensors (N,) of correct decisions on the same images, N > 0. `seed` seeds the bootstrap.

    Raises ValueError when their lengths differ or are 0.
    """
    if first_N.shape != second_N.shape or not len(first_N):
        raise ValueError(f"cannot pair {len(first_N)} with {len(second_N)} images")
    change_N = first_N.double() - second_N.double()
    picks = torch.randint(len(change_N), (RESAMPLES, len(change_N)), generator=generator(seed, "bootstrap"))
    low, high = torch.quantile(change_N[picks].mean(dim=1), torch.tensor([TAIL, 1 - TAIL]).double()).tolist()
    only_first, only_second = int((change_N > 0).sum()), int((change_N < 0).sum())
    p = mcnemar_p_value(only_first, only_second)
    return PairedDifference(
        round(float(change_N.mean()), 6), round(low, 6), round(high, 6), only_first, only_second, round(p, 6)
    )


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Returns the exact two-sided p-value (McNemar 1947): a binomial test of the discordant images against 1/2."""
    from scipy.stats import binomtest  # noqa: PLC0415  (takes more than a second)

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0

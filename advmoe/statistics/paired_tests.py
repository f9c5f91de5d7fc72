"""Comparing two classifiers on the same images: never by looking whether two intervals overlap."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from advmoe.runtime.machine import generator

RESAMPLES = 2000  # of the bootstrap: the 95 % ends then wobble by a few hundredths of a point at most
TAIL = 0.025


@dataclass(frozen=True)
class PairedDifference:
    """`difference`: accuracy of the first minus the second, with its paired 95 % bootstrap interval [low, high];
    `only_first`, `only_second`: images that one gets right and the other wrong; `p`: exact McNemar, two-sided.
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
        """For JSON."""
        return asdict(self)


def compare(first_N: Tensor, second_N: Tensor, seed: int) -> PairedDifference:
    """From two bool tensors (N,) about the same images, N > 0. Raises ValueError when their lengths differ."""
    if first_N.shape != second_N.shape or not len(first_N):
        raise ValueError(f"cannot pair {len(first_N)} with {len(second_N)} images")
    change_N = first_N.double() - second_N.double()
    picks = torch.randint(len(change_N), (RESAMPLES, len(change_N)), generator=generator(seed, "bootstrap"))
    low, high = torch.quantile(change_N[picks].mean(dim=1), torch.tensor([TAIL, 1 - TAIL]).double()).tolist()
    only_first, only_second = int((change_N > 0).sum()), int((change_N < 0).sum())
    p = mcnemar(only_first, only_second)
    return PairedDifference(
        round(float(change_N.mean()), 6), round(low, 6), round(high, 6), only_first, only_second, round(p, 6)
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value (McNemar 1947): under no difference each discordant image falls either way alike."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    # integers until the end: 2**-discordant alone underflows for a thousand images
    tail, ways = 0, 1
    for count in range(fewer + 1):
        tail += ways
        ways = ways * (discordant - count) // (count + 1)  # the next binomial coefficient
    return float(min(1.0, 2 * tail / 2**discordant))

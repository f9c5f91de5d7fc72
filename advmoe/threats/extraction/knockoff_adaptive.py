"""Knockoff nets, adaptive: learn which kind of image is worth a query (Orekondy et al. 2019, arXiv 1812.02766, 4.1.2).

A gradient bandit (Sutton and Barto 2018, section 2.8) over the pool's groups of alike images. A group is rewarded for
answers that are certain, that have been rare so far, and that the surrogate would not have given (equations 3 to 5).

Shapes: N images, K classes, G groups.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings
from advmoe.models import inference
from advmoe.runtime.machine import device
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import Pool
from advmoe.threats.extraction.transfer_set import TransferSet, asked, joined

BATCH = 200  # images of a forward pass
TINY = 1e-12


class KnockoffAdaptive(Settings):
    """The budget is spent in `rounds`; after each a surrogate learns what is known, and the bandit learns from it."""

    kind: Literal["knockoff-adaptive"]
    pool: Pool
    rounds: PositiveInt


def knockoff_adaptive(settings: KnockoffAdaptive, tools: AttackContext) -> TransferSet:
    """As many images as the budget buys. Raises UserError for one that is larger than the pool, or too small."""
    pool, oracle = tools.candidates(settings.pool), tools.oracle
    tools.two_a_round(settings.rounds)
    bandit, open_N = Bandit(int(pool.groups.max()) + 1), torch.ones(len(pool), dtype=torch.bool)
    known: TransferSet | None = None
    for number in range(settings.rounds):
        rows = bandit.choose(pool.groups, open_N, oracle.left // (settings.rounds - number), tools.stream)
        open_N[rows] = False
        new = asked(oracle, pool.images[rows])
        if known is not None:
            surrogate = tools.learn(known)
            guesses = inference.predict(surrogate, new.images.to(device()).float() / PIXEL_LEVELS, BATCH).cpu()
            bandit.learn(pool.groups[rows], rewards(new.answers, known.answers, guesses))
        known = new if known is None else joined(known, new)
    assert known is not None
    return known


def rewards(answers_NK: Tensor, earlier_MK: Tensor, guesses_NK: Tensor) -> Tensor:
    """The mean of certainty, diversity and loss (N,), each brought to [0, 1]; `guesses`: the surrogate's logits."""
    top = answers_NK.topk(min(2, answers_NK.shape[1]), dim=1).values
    certainty = top[:, 0] - top[:, -1]
    diversity = (answers_NK - earlier_MK.mean(dim=0)).clamp_min(0).sum(dim=1)
    loss = functional.cross_entropy(guesses_NK, answers_NK, reduction="none")
    return torch.stack([_unit(each) for each in (certainty, diversity, loss)]).mean(dim=0)


def _unit(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(TINY)


class Bandit:
    """Preferences for groups, softmax of which is the policy; the mean reward so far is the baseline."""

    def __init__(self, groups: int) -> None:
        self.preferences_G = torch.zeros(groups, dtype=torch.float64)
        self.drawn_G = torch.zeros(groups, dtype=torch.float64)
        self.reward, self.rewarded = 0.0, 0

    @property
    def policy(self) -> Tensor:
        """How likely each group is, (G,)."""
        return self.preferences_G.softmax(0)

    def choose(self, groups_N: Tensor, open_N: Tensor, count: int, stream: torch.Generator) -> Tensor:
        """`count` of the open positions, none twice: each as likely as its group, shared among its open ones."""
        sizes_G = torch.bincount(groups_N[open_N], minlength=len(self.preferences_G)).clamp_min(1)
        weights_N = (self.policy / sizes_G)[groups_N].clamp_min(TINY) * open_N
        return torch.multinomial(weights_N, count, generator=stream)

    def learn(self, groups_N: Tensor, rewards_N: Tensor) -> None:
        """One step for each image, at a rate of one over how often its group was drawn."""
        for group, reward in zip(groups_N.tolist(), rewards_N.tolist(), strict=True):
            self.drawn_G[group] += 1
            surprise = (reward - self.reward) / float(self.drawn_G[group])
            chosen_G = torch.zeros_like(self.preferences_G)
            chosen_G[group] = 1
            self.preferences_G += surprise * (chosen_G - self.policy)
            self.rewarded += 1
            self.reward += (reward - self.reward) / self.rewarded

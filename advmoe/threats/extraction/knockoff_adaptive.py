"""Knockoff Nets with adaptive selection: a bandit chooses which images to query (Orekondy et al. 2019, arXiv
1812.02766, 4.1.2).

A gradient bandit (Sutton and Barto 2018, section 2.8) over the pool's groups of similar images. The reward is high for
answers that are certain, that have been rare so far, and that the surrogate does not predict (equations 3 to 5).

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
from advmoe.threats.extraction.transfer_set import TransferSet, concatenate, query

BATCH_SIZE = 200  # images of a forward pass
TINY = 1e-12


class KnockoffAdaptive(Settings):
    """Settings. The budget is used in `rounds`; before each but the first a surrogate is trained on all answers so far,
    and its predictions of the new answers give the bandit's rewards.
    """

    kind: Literal["knockoff-adaptive"]
    pool: Pool
    rounds: PositiveInt


def knockoff_adaptive(settings: KnockoffAdaptive, context: AttackContext) -> TransferSet:
    """Queries in rounds until the budget is used up. Raises UserError when it is larger than the pool, or too small."""
    pool, oracle = context.pool_for_budget(settings.pool), context.oracle
    context.require_two_queries_per_round(settings.rounds)
    bandit, available_N = Bandit(int(pool.groups.max()) + 1), torch.ones(len(pool), dtype=torch.bool)
    transfer_set: TransferSet | None = None
    for round_number in range(settings.rounds):
        rows = bandit.sample(
            pool.groups, available_N, oracle.remaining // (settings.rounds - round_number), context.stream
        )
        available_N[rows] = False
        new = query(oracle, pool.images[rows])
        if transfer_set is not None:
            surrogate = context.train_surrogate(transfer_set)
            logits = inference.predict(surrogate, new.images.to(device()).float() / PIXEL_LEVELS, BATCH_SIZE).cpu()
            bandit.update(pool.groups[rows], rewards(new.answers, transfer_set.answers, logits))
        transfer_set = new if transfer_set is None else concatenate(transfer_set, new)
    assert transfer_set is not None
    return transfer_set


def rewards(answers_NK: Tensor, earlier_MK: Tensor, logits_NK: Tensor) -> Tensor:
    """Returns the mean of certainty, diversity and loss (N,), each scaled to [0, 1]; `logits_NK`: the surrogate's."""
    top = answers_NK.topk(min(2, answers_NK.shape[1]), dim=1).values
    certainty = top[:, 0] - top[:, -1]
    diversity = (answers_NK - earlier_MK.mean(dim=0)).clamp_min(0).sum(dim=1)
    loss = functional.cross_entropy(logits_NK, answers_NK, reduction="none")
    return torch.stack([_min_max_scaled(each) for each in (certainty, diversity, loss)]).mean(dim=0)


def _min_max_scaled(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(TINY)


class Bandit:
    """Gradient bandit: the policy is the softmax of the preferences, the baseline is the mean reward so far."""

    def __init__(self, groups: int) -> None:
        self.preferences_G = torch.zeros(groups, dtype=torch.float64)
        self.draws_G = torch.zeros(groups, dtype=torch.float64)
        self.mean_reward, self.updates = 0.0, 0

    @property
    def policy(self) -> Tensor:
        """The probability of each group (G,)."""
        return self.preferences_G.softmax(0)

    def sample(self, groups_N: Tensor, available_N: Tensor, count: int, stream: torch.Generator) -> Tensor:
        """Draws `count` available positions without replacement; a group's probability is shared among its images."""
        sizes_G = torch.bincount(groups_N[available_N], minlength=len(self.preferences_G)).clamp_min(1)
        weights_N = (self.policy / sizes_G)[groups_N].clamp_min(TINY) * available_N
        return torch.multinomial(weights_N, count, generator=stream)

    def update(self, groups_N: Tensor, rewards_N: Tensor) -> None:
        """Makes one gradient step for each image, with learning rate 1 / (number of draws of its group)."""
        for group, reward in zip(groups_N.tolist(), rewards_N.tolist(), strict=True):
            self.draws_G[group] += 1
            scaled_advantage = (reward - self.mean_reward) / float(self.draws_G[group])
            chosen_G = torch.zeros_like(self.preferences_G)
            chosen_G[group] = 1
            self.preferences_G += scaled_advantage * (chosen_G - self.policy)
            self.updates += 1
            self.mean_reward += (reward - self.mean_reward) / self.updates

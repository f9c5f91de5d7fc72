"""The context of an extraction attack: the oracle, pools of query images, and surrogate training during the attack."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from advmoe.core.errors import UserError
from advmoe.data.dataset import DatasetInfo
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback, checkpointing
from advmoe.threats.extraction.oracle import Oracle
from advmoe.threats.extraction.query_pools import AnyPool, Candidates
from advmoe.threats.extraction.transfer_set import TransferSet


def no_checkpoints(work: Resumable) -> AbstractContextManager[StepCallback]:
    """Saves no checkpoints: an interrupted attack starts again from the beginning."""
    return checkpointing(work, "", None)


@dataclass(frozen=True)
class AttackContext:
    """Arguments of every attack. `load_pool`: returns a pool's images; `train_surrogate`: trains a network from scratch
    on a transfer set; `build_surrogate`: returns an untrained one; `stream`: source of all other randomness; `facts`:
    of the victim's images; `checkpointing`: resumes and saves long work, see `advmoe.runtime.checkpoints.manager`.
    """

    oracle: Oracle
    load_pool: Callable[[AnyPool], Candidates]
    train_surrogate: Callable[[TransferSet], nn.Module]
    build_surrogate: Callable[[], nn.Module]
    stream: torch.Generator
    facts: DatasetInfo
    checkpointing: Callable[[Resumable], AbstractContextManager[StepCallback]] = no_checkpoints

    def pool_for_budget(self, pool: AnyPool) -> Candidates:
        """Returns the pool's images. Raises UserError when the budget is larger than the pool."""
        candidates = self.load_pool(pool)
        self.require_budget_at_most(len(candidates), f"the pool has {len(candidates)} images")
        return candidates

    def require_budget_at_most(self, limit: int, reason: str) -> None:
        """Raises UserError when the budget is larger than `limit`, the number of queries that the attack can send."""
        if self.oracle.budget > limit:
            raise UserError(f"a budget of {self.oracle.budget} queries cannot be used up: {reason}")

    def require_two_queries_per_round(self, rounds: int) -> None:
        """Raises UserError when the budget is less than two queries per round: BatchNorm cannot train on one image."""
        if self.oracle.budget < 2 * rounds:
            raise UserError(f"a budget of {self.oracle.budget} queries is less than two in each of {rounds} rounds")

"""What an attacker works with: the oracle, images to ask about, and networks to train in between."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from advmoe.core.errors import UserError
from advmoe.data.dataset import Facts
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback, checkpointing
from advmoe.threats.extraction.oracle import Oracle
from advmoe.threats.extraction.query_pools import AnyPool, Candidates
from advmoe.threats.extraction.transfer_set import TransferSet


def no_checkpoints(work: Resumable) -> AbstractContextManager[StepCallback]:
    """What an attacker has who begins anew after a kill."""
    return checkpointing(work, "", None)


@dataclass(frozen=True)
class AttackContext:
    """`gather`: a pool's images; `learn`: a network trained from scratch on what is known so far; `fresh`: one that is
    untrained; `stream`: where all other randomness comes from; `facts`: of the victim's images; `keep`: puts long
    work where a killed one left it, see `advmoe.runtime.checkpoints.manager`.
    """

    oracle: Oracle
    gather: Callable[[AnyPool], Candidates]
    learn: Callable[[TransferSet], nn.Module]
    fresh: Callable[[], nn.Module]
    stream: torch.Generator
    facts: Facts
    keep: Callable[[Resumable], AbstractContextManager[StepCallback]] = no_checkpoints

    def candidates(self, pool: AnyPool) -> Candidates:
        """The pool's images. Raises UserError, before anything is asked, when the budget is larger than the pool."""
        found = self.gather(pool)
        self.reach(len(found), f"there are {len(found)} images to ask about")
        return found

    def reach(self, most: int, why: str) -> None:
        """Raises UserError when the budget is more than `most` queries, which is all that this attack can ask."""
        if self.oracle.budget > most:
            raise UserError(f"a budget of {self.oracle.budget} queries cannot be spent: {why}")

    def two_a_round(self, rounds: int) -> None:
        """Raises UserError when the budget is less than two queries a round: no network learns from one image."""
        if self.oracle.budget < 2 * rounds:
            raise UserError(f"a budget of {self.oracle.budget} queries is less than two in each of {rounds} rounds")

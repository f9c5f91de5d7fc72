"""Copycat CNN: queries a mix of out-of-distribution and in-distribution images (Correia-Silva et al. 2018, arXiv
1806.05476).

The authors train on the out-of-distribution images first and fine-tune on the others; here one recipe learns both at
once, as for every other attack.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from advmoe.core.settings import Settings
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import InDistribution, Pool
from advmoe.threats.extraction.transfer_set import TransferSet, query


class Copycat(Settings):
    """Settings. Queries images of `pool` and, for an evenly spread share `own` of the budget, in-distribution ones."""

    kind: Literal["copycat"]
    pool: Pool
    own: Annotated[float, Field(gt=0, lt=1)]


def copycat(settings: Copycat, context: AttackContext) -> TransferSet:
    """Sends all queries at once. Raises UserError when a pool is too small for the budget."""
    budget = context.oracle.remaining
    # evenly spread, so that a smaller budget gets the same mix
    steps = (torch.arange(budget + 1) * settings.own).long()
    is_own = steps[1:] > steps[:-1]
    foreign, own = context.load_pool(settings.pool), context.load_pool(InDistribution(kind="in-distribution"))
    for pool, required in ((foreign, int((~is_own).sum())), (own, int(is_own.sum()))):
        if required > len(pool):
            context.require_budget_at_most(len(pool), f"it needs {required} images from a pool of {len(pool)}")
    images = torch.empty(budget, *own.images.shape[1:], dtype=torch.uint8)
    images[is_own] = own.images[: int(is_own.sum())]
    images[~is_own] = foreign.images[: int((~is_own).sum())]
    return query(context.oracle, images)

"""Copycat CNN: ask about images of any kind, and some of the right kind (Correia-Silva et al. 2018, arXiv 1806.05476).

The authors train on the foreign images first and fine-tune on the others; here one recipe learns both at once, as for
every other attack.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from advmoe.core.settings import Settings
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import InDistribution, Pool
from advmoe.threats.extraction.transfer_set import TransferSet, asked


class Copycat(Settings):
    """Images of the `pool`, but a share `own` of the budget, evenly spread, goes to the in-distribution pool."""

    kind: Literal["copycat"]
    pool: Pool
    own: Annotated[float, Field(gt=0, lt=1)]


def copycat(settings: Copycat, tools: AttackContext) -> TransferSet:
    """Every query at once. Raises UserError when the budget is larger than either pool allows."""
    budget = tools.oracle.left
    # evenly spread, so that a smaller budget would have bought the same mixture
    steps = (torch.arange(budget + 1) * settings.own).long()
    is_own = steps[1:] > steps[:-1]
    foreign, own = tools.gather(settings.pool), tools.gather(InDistribution(kind="in-distribution"))
    for found, wanted in ((foreign, int((~is_own).sum())), (own, int(is_own.sum()))):
        if wanted > len(found):
            tools.reach(len(found), f"it takes {wanted} images of a pool of {len(found)}")
    images = torch.empty(budget, *own.images.shape[1:], dtype=torch.uint8)
    images[is_own] = own.images[: int(is_own.sum())]
    images[~is_own] = foreign.images[: int((~is_own).sum())]
    return asked(tools.oracle, images)

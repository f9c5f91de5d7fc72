"""Knockoff Nets with random selection: queries images of one pool (Orekondy et al. 2019, arXiv 1812.02766).

The in-distribution pool gives the usual strong baseline, uniform noise the lower bound.
"""

from typing import Literal

from advmoe.core.settings import Settings
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import Pool
from advmoe.threats.extraction.transfer_set import TransferSet, query


class Knockoff(Settings):
    """Settings. Queries images of `pool` in random order until the budget is used up."""

    kind: Literal["knockoff"]
    pool: Pool


def knockoff(settings: Knockoff, context: AttackContext) -> TransferSet:
    """Sends all queries at once. Raises UserError when the budget is larger than the pool."""
    return query(context.oracle, context.pool_for_budget(settings.pool).images[: context.oracle.remaining])

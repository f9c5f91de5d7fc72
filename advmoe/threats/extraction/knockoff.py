"""Knockoff nets, random: ask about images of any kind, learn the answers (Orekondy et al. 2019, arXiv 1812.02766).

With the attacker's in-distribution pool it is the customary strong control; with noise, the floor.
"""

from typing import Literal

from advmoe.core.settings import Settings
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import Pool
from advmoe.threats.extraction.transfer_set import TransferSet, asked


class Knockoff(Settings):
    """Images of the `pool`, in random order, as many as the budget buys."""

    kind: Literal["knockoff"]
    pool: Pool


def knockoff(settings: Knockoff, tools: AttackContext) -> TransferSet:
    """Every query at once. Raises UserError when the budget is larger than the pool."""
    return asked(tools.oracle, tools.candidates(settings.pool).images[: tools.oracle.left])

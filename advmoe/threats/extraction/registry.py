"""All extraction attacks by name. A new one is a file beside this, a line in the union and one in ATTACKS."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from advmoe.threats.extraction.best import Best, best
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.copycat import Copycat, copycat
from advmoe.threats.extraction.dfme import Dfme, dfme
from advmoe.threats.extraction.jbda import Jbda, jbda
from advmoe.threats.extraction.knockoff import Knockoff, knockoff
from advmoe.threats.extraction.knockoff_adaptive import KnockoffAdaptive, knockoff_adaptive
from advmoe.threats.extraction.transfer_set import TransferSet

AnyExtraction = Knockoff | KnockoffAdaptive | Copycat | Jbda | Best | Dfme
Extraction = Annotated[AnyExtraction, Field(discriminator="kind")]
BY_SHARES = (Best, KnockoffAdaptive)  # their first queries depend on the whole budget
ATTACKS: dict[type[Any], Callable[..., TransferSet]] = {
    Knockoff: knockoff,
    KnockoffAdaptive: knockoff_adaptive,
    Copycat: copycat,
    Jbda: jbda,
    Best: best,
    Dfme: dfme,
}


def steal(settings: AnyExtraction, tools: AttackContext) -> TransferSet:
    """Spend the oracle's budget. Raises UserError for a budget that cannot be spent, and for what the victim does."""
    return ATTACKS[type(settings)](settings, tools)

"""The registry of extraction attacks. To add one, write its module and extend `AnyExtraction` and `ATTACKS`."""

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
SINGLE_BUDGET_ATTACKS = (Best, KnockoffAdaptive)  # the first queries of a run depend on its whole budget
ATTACKS: dict[type[Any], Callable[..., TransferSet]] = {
    Knockoff: knockoff,
    KnockoffAdaptive: knockoff_adaptive,
    Copycat: copycat,
    Jbda: jbda,
    Best: best,
    Dfme: dfme,
}


def run_extraction(settings: AnyExtraction, context: AttackContext) -> TransferSet:
    """Runs an attack up to the oracle's budget.

    Raises UserError for a budget that the attack cannot use up and for errors of the victim.
    """
    return ATTACKS[type(settings)](settings, context)

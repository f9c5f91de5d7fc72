"""All attacks by name. A new one is a file beside this, a line in the union and a row in the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from torch import Tensor

from advmoe.attacks.apgd import ApgdCe, ApgdT, apgd_ce, apgd_t
from advmoe.attacks.custom import Custom, custom
from advmoe.attacks.fab import FabT, fab_t
from advmoe.attacks.fgsm import Fgsm, fgsm
from advmoe.attacks.gate_aware import (
    Experts,
    GateFrozen,
    Misrouting,
    Transfer,
    experts,
    gate_frozen,
    misrouting,
    transfer,
)
from advmoe.attacks.interface import AttackFn, Model
from advmoe.attacks.noise import Noise, noise
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.rays import RayS, rays
from advmoe.attacks.square import Square, square

AnyAttack = (
    Fgsm | Pgd | ApgdCe | ApgdT | FabT | Square | RayS | Noise | GateFrozen | Misrouting | Experts | Transfer | Custom
)
Attack = Annotated[AnyAttack, Field(discriminator="kind")]
Access = Literal["white", "score", "decision", "none", "transfer", "own"]


@dataclass(frozen=True)
class Entry:
    """What a reader of a result must know of an attack.

    `passes`: settings -> forward and backward passes for an image that survives, at most, in one sentence or number;
    `needs_gate`: only a mixture has what it attacks; `full_precision`: it compares small differences between logits,
    for which bfloat16 is too coarse.
    """

    function: Callable[..., Tensor]
    access: Access
    passes: Callable[[Any], tuple[int, int]]
    source: str
    needs_gate: bool = False
    full_precision: bool = False


def _climbs(times: int, settings: Any, first: int = 0) -> tuple[int, int]:
    """So many ascents, each with a look at its last point; `first`: looks at the clean image before them."""
    ascents = times * settings.restarts
    return first + ascents * (settings.steps + 1), ascents * settings.steps


def _apgd(times: int, settings: Any, first: int = 0) -> tuple[int, int]:
    """The same, but the last point's gradient is taken too."""
    forward, _ = _climbs(times, settings)
    return first + forward, forward


ENTRIES: dict[type[Any], Entry] = {
    Fgsm: Entry(fgsm, "white", lambda _: (1, 1), "Goodfellow et al. 2015"),
    Pgd: Entry(
        pgd,
        "white",
        lambda s: _climbs(max(1, s.targets), s, min(1, s.targets)),
        "Madry et al. 2018; Carlini & Wagner 2017",
    ),
    ApgdCe: Entry(apgd_ce, "white", lambda s: _apgd(1, s), "Croce & Hein 2020b"),
    ApgdT: Entry(apgd_t, "white", lambda s: _apgd(s.targets, s, 1), "Croce & Hein 2020b"),
    FabT: Entry(fab_t, "white", lambda s: _climbs(s.targets, s, 1), "Croce & Hein 2020a", full_precision=True),
    Square: Entry(square, "score", lambda s: (s.queries, 0), "Andriushchenko et al. 2020", full_precision=True),
    RayS: Entry(rays, "decision", lambda s: (s.queries, 0), "Chen & Gu 2020"),
    Noise: Entry(noise, "none", lambda s: (s.draws, 0), "-"),
    GateFrozen: Entry(gate_frozen, "white", lambda s: _climbs(1, s, 1), "advmoe", needs_gate=True),
    Misrouting: Entry(misrouting, "white", lambda s: _climbs(len(s.lambdas), s), "advmoe", needs_gate=True),
    Experts: Entry(experts, "white", lambda s: _climbs(1, s), "advmoe; costs are those of one whole mixture", True),
    Transfer: Entry(transfer, "transfer", lambda s: _climbs(len(s.sources), s), "Papernot et al. 2016"),
    Custom: Entry(custom, "own", lambda _: (0, 0), "yours"),
}
KINDS: tuple[str, ...] = tuple(get_args(settings.model_fields["kind"].annotation)[0] for settings in ENTRIES)


def bind(settings: AnyAttack, sources: Mapping[str, Model]) -> AttackFn:
    """The attack that `settings` name, as a function; `sources` are what a transfer may craft on."""
    function = ENTRIES[type(settings)].function
    if isinstance(settings, Transfer):
        return partial(function, settings=settings, sources=sources)
    return partial(function, settings=settings)


def sources_of(settings: AnyAttack) -> tuple[str, ...]:
    """The other networks that an attack crafts on."""
    return settings.sources if isinstance(settings, Transfer) else ()

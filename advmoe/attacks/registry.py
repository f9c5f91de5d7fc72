"""The registry of attacks: settings, functions, access to the model, costs and sources.

To add an attack: write a module in `advmoe/attacks`, and add it to `AttackSettings` and `REGISTRY`.
"""

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

AttackSettings = (
    Fgsm | Pgd | ApgdCe | ApgdT | FabT | Square | RayS | Noise | GateFrozen | Misrouting | Experts | Transfer | Custom
)
Attack = Annotated[AttackSettings, Field(discriminator="kind")]
Access = Literal["white", "score", "decision", "none", "transfer", "own"]


@dataclass(frozen=True)
class AttackEntry:
    """An attack function and its properties.

    `access`: what the attack uses of the model. `passes`: settings -> most forward and backward passes per image;
    `source`: the publication. `needs_gate`: applies to mixtures only. `full_precision`: compares small differences
    between logits, for which bfloat16 is too coarse.
    """

    function: Callable[..., Tensor]
    access: Access
    passes: Callable[[Any], tuple[int, int]]
    source: str
    needs_gate: bool = False
    full_precision: bool = False


def _ascent_passes(times: int, settings: Any, first: int = 0) -> tuple[int, int]:
    """Passes of PGD-like ascents, each with a final forward pass; `first`: passes on the clean image before them."""
    ascents = times * settings.restarts
    return first + ascents * (settings.steps + 1), ascents * settings.steps


def _apgd_passes(times: int, settings: Any, first: int = 0) -> tuple[int, int]:
    """The same for APGD, which also computes the gradient at the last point."""
    forward, _ = _ascent_passes(times, settings)
    return first + forward, forward


REGISTRY: dict[type[Any], AttackEntry] = {
    Fgsm: AttackEntry(fgsm, "white", lambda _: (1, 1), "Goodfellow et al. 2015"),
    Pgd: AttackEntry(
        pgd,
        "white",
        lambda s: _ascent_passes(max(1, s.targets), s, min(1, s.targets)),
        "Madry et al. 2018; Carlini & Wagner 2017",
    ),
    ApgdCe: AttackEntry(apgd_ce, "white", lambda s: _apgd_passes(1, s), "Croce & Hein 2020b"),
    ApgdT: AttackEntry(apgd_t, "white", lambda s: _apgd_passes(s.targets, s, 1), "Croce & Hein 2020b"),
    FabT: AttackEntry(
        fab_t, "white", lambda s: _ascent_passes(s.targets, s, 1), "Croce & Hein 2020a", full_precision=True
    ),
    Square: AttackEntry(square, "score", lambda s: (s.queries, 0), "Andriushchenko et al. 2020", full_precision=True),
    RayS: AttackEntry(rays, "decision", lambda s: (s.queries, 0), "Chen & Gu 2020"),
    Noise: AttackEntry(noise, "none", lambda s: (s.draws, 0), "-"),
    GateFrozen: AttackEntry(gate_frozen, "white", lambda s: _ascent_passes(1, s, 1), "advmoe", needs_gate=True),
    Misrouting: AttackEntry(
        misrouting, "white", lambda s: _ascent_passes(len(s.lambdas), s), "advmoe", needs_gate=True
    ),
    Experts: AttackEntry(
        experts, "white", lambda s: _ascent_passes(1, s), "advmoe; costs are those of one whole mixture", True
    ),
    Transfer: AttackEntry(transfer, "transfer", lambda s: _ascent_passes(len(s.sources), s), "Papernot et al. 2016"),
    Custom: AttackEntry(custom, "own", lambda _: (0, 0), "yours"),
}
KINDS: tuple[str, ...] = tuple(get_args(settings.model_fields["kind"].annotation)[0] for settings in REGISTRY)


def bind(settings: AttackSettings, sources: Mapping[str, Model]) -> AttackFn:
    """Returns the attack function with `settings` bound; `sources` are the networks a transfer attack may use."""
    function = REGISTRY[type(settings)].function
    if isinstance(settings, Transfer):
        return partial(function, settings=settings, sources=sources)
    return partial(function, settings=settings)


def transfer_sources(settings: AttackSettings) -> tuple[str, ...]:
    """Returns the names of the other networks that an attack needs."""
    return settings.sources if isinstance(settings, Transfer) else ()

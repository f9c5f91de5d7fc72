"""Attacks with their standard settings, and named sets of them: for models and places without a params.yaml.

The numbers are those of the sources; where a source leaves one open, the reason stands beside it.
"""

from collections.abc import Mapping
from typing import Literal, TypedDict

from advmoe.attacks.apgd import ApgdCe, ApgdT
from advmoe.attacks.fab import FabT
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting, Transfer
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.rays import RayS
from advmoe.attacks.registry import ENTRIES, AnyAttack
from advmoe.attacks.square import Square

Preset = Literal["autoattack", "adaptive"]


class _Climb(TypedDict):
    steps: int
    step_size: float
    restarts: int


# 50 steps of a quarter epsilon: twelve times the radius, whatever the radius is
CLIMB: _Climb = {"steps": 50, "step_size": 0.25, "restarts": 1}

STANDARD: Mapping[str, AnyAttack] = {
    "fgsm": Fgsm(kind="fgsm"),
    "pgd": Pgd(kind="pgd", **CLIMB, loss="ce", targets=0),
    "pgd-margin": Pgd(kind="pgd", **CLIMB, loss="margin", targets=0),
    "pgd-targeted": Pgd(kind="pgd", **CLIMB, loss="margin", targets=9),
    "apgd-ce": ApgdCe(kind="apgd-ce", steps=100, restarts=1),
    "apgd-t": ApgdT(kind="apgd-t", steps=100, targets=9, restarts=1),
    "fab-t": FabT(kind="fab-t", steps=100, targets=9, restarts=1),
    "square": Square(kind="square", queries=5000, p_init=0.8),
    "rays": RayS(kind="rays", queries=10000),  # the paper's curves are flat by then
    "noise": Noise(kind="noise", draws=100),  # a floor, not an attack; 100 to give chance its chance
    "gate-frozen": GateFrozen(kind="gate-frozen", **CLIMB),
    "misrouting": Misrouting(
        kind="misrouting", **CLIMB, lambdas=(0.0, 0.1, 1.0, 10.0)
    ),  # decades around CE's own scale
    "experts": Experts(kind="experts", **CLIMB),
}

# The standard four of Croce & Hein 2020 (arXiv 2003.01690), in their order, each on what the ones before left.
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
# A mixture end to end, then what only a mixture has: (a) to (d). (e) needs networks to transfer from.
ADAPTIVE = ("pgd", "pgd-margin", "apgd-ce", "apgd-t", "gate-frozen", "misrouting", "experts")


def preset(name: Preset, sources: tuple[str, ...], has_gate: bool) -> dict[str, AnyAttack]:
    """The attacks of a set, as far as the model has what they attack; `sources`: networks to transfer from."""
    members = AUTOATTACK if name == "autoattack" else ADAPTIVE
    attacks = {
        member: STANDARD[member] for member in members if has_gate or not ENTRIES[type(STANDARD[member])].needs_gate
    }
    if name == "adaptive" and sources:
        attacks["transfer"] = Transfer(kind="transfer", **CLIMB, sources=sources)
    return attacks


COLUMNS = ("attack", "norms", "access", "forward", "backward", "source")


def rows() -> list[list[str]]:
    """The table of `advmoe attacks`: name, norms, access, most forward and backward passes for an image, source."""
    listed = [_row(name, attack) for name, attack in STANDARD.items()]
    listed.append(_row("transfer", Transfer(kind="transfer", **CLIMB, sources=("network",))))
    listed.append(["autoattack", "L-inf, L2", "white, score", *_sum(AUTOATTACK), ", ".join(AUTOATTACK)])
    listed.append(["adaptive", "L-inf, L2", "white", *_sum(ADAPTIVE), ", ".join((*ADAPTIVE, "transfer"))])
    listed.append(["path/to/file.py:function", "L-inf, L2", "own", "", "", "yours, in the same form"])
    return listed


def _row(name: str, attack: AnyAttack) -> list[str]:
    entry = ENTRIES[type(attack)]
    access = f"{entry.access}, mixtures" if entry.needs_gate else entry.access
    return [name, "L-inf, L2", access, *map(str, entry.passes(attack)), entry.source]


def _sum(members: tuple[str, ...]) -> list[str]:
    passes = [ENTRIES[type(STANDARD[member])].passes(STANDARD[member]) for member in members]
    return [str(sum(column)) for column in zip(*passes, strict=True)]

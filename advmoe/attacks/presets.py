"""Attacks with standard settings, and named sets of them, for models evaluated without a params.yaml.

The numbers are those of the sources; where a source leaves one open, a comment gives the reason.
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
from advmoe.attacks.registry import REGISTRY, AttackSettings
from advmoe.attacks.square import Square

Preset = Literal["autoattack", "adaptive"]


class _AscentNumbers(TypedDict):
    steps: int
    step_size: float
    restarts: int


# 50 steps of a quarter epsilon: twelve times the radius
ASCENT: _AscentNumbers = {"steps": 50, "step_size": 0.25, "restarts": 1}

STANDARD_ATTACKS: Mapping[str, AttackSettings] = {
    "fgsm": Fgsm(kind="fgsm"),
    "pgd": Pgd(kind="pgd", **ASCENT, loss="ce", targets=0),
    "pgd-margin": Pgd(kind="pgd", **ASCENT, loss="margin", targets=0),
    "pgd-targeted": Pgd(kind="pgd", **ASCENT, loss="margin", targets=9),
    "apgd-ce": ApgdCe(kind="apgd-ce", steps=100, restarts=1),
    "apgd-t": ApgdT(kind="apgd-t", steps=100, targets=9, restarts=1),
    "fab-t": FabT(kind="fab-t", steps=100, targets=9, restarts=1),
    "square": Square(kind="square", queries=5000, p_init=0.8),
    "rays": RayS(kind="rays", queries=10000),  # the paper's curves have converged by then
    "noise": Noise(kind="noise", draws=100),  # a lower bound, not an attack
    "gate-frozen": GateFrozen(kind="gate-frozen", **ASCENT),
    "misrouting": Misrouting(
        kind="misrouting", **ASCENT, lambdas=(0.0, 0.1, 1.0, 10.0)
    ),  # decades around CE's own scale
    "experts": Experts(kind="experts", **ASCENT),
}

# The standard four of Croce & Hein 2020 (arXiv 2003.01690), in their order, each on the survivors of the others.
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
# Attacks (a) to (d) of `advmoe.attacks.gate_aware`; (e) needs networks to transfer from.
ADAPTIVE = ("pgd", "pgd-margin", "apgd-ce", "apgd-t", "gate-frozen", "misrouting", "experts")


def preset(name: Preset, sources: tuple[str, ...], has_gate: bool) -> dict[str, AttackSettings]:
    """Returns the attacks of a set by name, without those that need a gate if the model has none.

    `sources`: names of networks to transfer from; `adaptive` includes `transfer` only if there are any.
    """
    members = AUTOATTACK if name == "autoattack" else ADAPTIVE
    attacks = {
        member: STANDARD_ATTACKS[member]
        for member in members
        if has_gate or not REGISTRY[type(STANDARD_ATTACKS[member])].needs_gate
    }
    if name == "adaptive" and sources:
        attacks["transfer"] = Transfer(kind="transfer", **ASCENT, sources=sources)
    return attacks


TABLE_COLUMNS = ("attack", "norms", "access", "forward", "backward", "source")


def attack_table() -> list[list[str]]:
    """Returns the rows of `advmoe attacks`: name, norms, access, most forward and backward passes per image, source."""
    table = [_table_row(name, attack) for name, attack in STANDARD_ATTACKS.items()]
    table.append(_table_row("transfer", Transfer(kind="transfer", **ASCENT, sources=("network",))))
    table.append(["autoattack", "L-inf, L2", "white, score", *_total_passes(AUTOATTACK), ", ".join(AUTOATTACK)])
    table.append(["adaptive", "L-inf, L2", "white", *_total_passes(ADAPTIVE), ", ".join((*ADAPTIVE, "transfer"))])
    table.append(["path/to/file.py:function", "L-inf, L2", "own", "", "", "your own attack function"])
    return table


def _table_row(name: str, attack: AttackSettings) -> list[str]:
    entry = REGISTRY[type(attack)]
    access = f"{entry.access}, mixtures" if entry.needs_gate else entry.access
    return [name, "L-inf, L2", access, *map(str, entry.passes(attack)), entry.source]


def _total_passes(members: tuple[str, ...]) -> list[str]:
    passes = [REGISTRY[type(STANDARD_ATTACKS[member])].passes(STANDARD_ATTACKS[member]) for member in members]
    return [str(sum(column)) for column in zip(*passes, strict=True)]

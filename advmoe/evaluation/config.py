"""The suite: which attacks a model meets, on which terms.

Shapes: N images, C channel, H/W pixels.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from advmoe.attacks import presets, registry
from advmoe.attacks.ball import Ball, LInf
from advmoe.attacks.fab import FabT
from advmoe.attacks.gate_aware import Transfer
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import AnyAttack, Attack
from advmoe.core.settings import Epsilon, PositiveInt, Settings
from advmoe.evaluation.checks.base import Probes
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget, clear_resume_state, evaluate
from advmoe.models.inference import Precision
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Share


class Grid(Settings):
    """A fixed set of radii, so that experiments with different threat models can be compared."""

    epsilons: Annotated[tuple[Epsilon, ...], Field(min_length=1)]
    attack: Attack


class EvaluateSection(Settings):
    """`limit`: only the first so many images of the test split (it is shuffled), None for all; `limits`: fewer for
    single attacks, by name. `drop_fallen`: spare fallen images the later attacks. `presets`: sets of attacks beside
    `attacks`. `experts`: names of those attacks that experts and ensembles without a verdict meet. `minimal`: what
    looks for the smallest epsilon.
    """

    limit: PositiveInt | None
    batch_size: PositiveInt | Literal["auto"]
    precision: Precision
    drop_fallen: bool
    baselines: tuple[str, ...]
    presets: tuple[Preset, ...]
    attacks: Annotated[dict[str, Attack], Field(min_length=1)]
    limits: dict[str, PositiveInt]
    experts: Annotated[tuple[str, ...], Field(min_length=1)]
    checks: Probes
    grid: Grid
    minimal: FabT

    @field_validator("attacks")
    @classmethod
    def _names_are_free(cls, attacks: dict[str, Attack]) -> dict[str, Attack]:
        taken = {CLEAN, WORST} & attacks.keys()
        if taken:
            raise ValueError(f"'{taken.pop()}' is the name of a result, call the attack something else")
        return attacks

    @model_validator(mode="after")
    def _names_are_known(self) -> "EvaluateSection":
        for key, names in (("experts", self.experts), ("limits", tuple(self.limits))):
            strangers = [name for name in names if name not in self.attacks]
            if strangers:
                raise ValueError(f"{key} names '{strangers[0]}', but attacks has only {', '.join(self.attacks)}")
        known = [f"baseline/{name}" for name in self.baselines]
        for name, attack in self.attacks.items():
            lost = [source for source in registry.sources_of(attack) if source not in known]
            if lost:
                raise ValueError(f"attacks.{name} transfers from '{lost[0]}', but there is only {', '.join(known)}")
        return self

    def terms(self, ball: Ball, seed: int) -> EvaluationConfig:
        """The terms these settings make; `seed` is the evaluations' stream."""
        return EvaluationConfig(
            ball=ball,
            seed=seed,
            precision=self.precision,
            batch_size=None if self.batch_size == "auto" else self.batch_size,
            drop_fallen=self.drop_fallen,
            limits=self.limits,
        )

    def full(self) -> dict[str, AnyAttack]:
        """All attacks: those listed, then those of the presets that are not there yet."""
        wanted: dict[str, AnyAttack] = dict(self.attacks)
        sources = tuple(f"baseline/{name}" for name in self.baselines)
        for name in self.presets:
            for member, attack in presets.preset(name, sources, has_gate=True).items():
                # the standard numbers under a name of their own, where the list has others under the plain one
                wanted[member if wanted.get(member, attack) == attack else f"{name}.{member}"] = attack
        return wanted


def fitting(attacks: Mapping[str, AnyAttack], has_gate: bool, known: Container[str]) -> dict[str, AnyAttack]:
    """Those attacks that find in a model what they attack; a transfer keeps those of its sources that are `known`."""
    fit: dict[str, AnyAttack] = {}
    for name, attack in attacks.items():
        if registry.ENTRIES[type(attack)].needs_gate and not has_gate:
            continue
        if not isinstance(attack, Transfer):
            fit[name] = attack
        elif sources := tuple(source for source in attack.sources if source in known):
            fit[name] = attack.model_copy(update={"sources": sources})
    return fit


def robustness_curve(target: EvaluationTarget, grid: Grid, terms: EvaluationConfig) -> Iterator[tuple[float, Share]]:
    """Yield (L-inf epsilon, accuracy) over the grid."""
    for epsilon in grid.epsilons:
        at = EvaluationConfig(LInf(epsilon), terms.seed, terms.precision, terms.batch_size, terms.drop_fallen, {})
        attacks: dict[str, AnyAttack] = {grid.attack.kind: grid.attack}
        measured = evaluate(target, attacks, at)
        yield epsilon, measured.shares()[WORST]
        clear_resume_state(target, attacks, at)

"""Settings of the evaluation: which attacks run on which models, and the epsilon grid.

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
from advmoe.attacks.registry import Attack, AttackSettings
from advmoe.core.settings import Epsilon, PositiveInt, Settings
from advmoe.evaluation.checks.base import CheckSettings
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget, clear_resume_state, evaluate
from advmoe.models.inference import Precision
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Proportion


class EpsilonGrid(Settings):
    """A fixed set of L-inf radii, so that experiments with different threat models can be compared."""

    epsilons: Annotated[tuple[Epsilon, ...], Field(min_length=1)]
    attack: Attack


class EvaluateSection(Settings):
    """The section `evaluate` of params.yaml.

    `limit`: number of leading images of the (shuffled) test split, None for all; `limits`: fewer for single attacks, by
    name. `drop_fallen`: skip images that an earlier attack fooled. `presets`: sets of attacks in addition to `attacks`.
    `experts`: names of the attacks that run on experts and ensembles, which get no verdict. `minimal`: the attack that
    finds the smallest epsilon.
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
    checks: CheckSettings
    grid: EpsilonGrid
    minimal: FabT

    @field_validator("attacks")
    @classmethod
    def _names_are_free(cls, attacks: dict[str, Attack]) -> dict[str, Attack]:
        reserved = {CLEAN, WORST} & attacks.keys()
        if reserved:
            raise ValueError(f"'{reserved.pop()}' is the name of a result; choose another name for the attack")
        return attacks

    @model_validator(mode="after")
    def _names_are_known(self) -> "EvaluateSection":
        for key, names in (("experts", self.experts), ("limits", tuple(self.limits))):
            unknown = [name for name in names if name not in self.attacks]
            if unknown:
                raise ValueError(f"{key} names '{unknown[0]}', but attacks has only {', '.join(self.attacks)}")
        known = [f"baseline/{name}" for name in self.baselines]
        for name, attack in self.attacks.items():
            missing = [source for source in registry.transfer_sources(attack) if source not in known]
            if missing:
                raise ValueError(f"attacks.{name} transfers from '{missing[0]}', but there is only {', '.join(known)}")
        return self

    def evaluation_config(self, ball: Ball, seed: int) -> EvaluationConfig:
        """Returns the config of the harness; `seed` comes from `evaluation_seed`."""
        return EvaluationConfig(
            ball=ball,
            seed=seed,
            precision=self.precision,
            batch_size=None if self.batch_size == "auto" else self.batch_size,
            drop_fallen=self.drop_fallen,
            limits=self.limits,
        )

    def all_attacks(self) -> dict[str, AttackSettings]:
        """Returns all attacks by name: those listed, then those of the presets that are not listed."""
        attacks: dict[str, AttackSettings] = dict(self.attacks)
        sources = tuple(f"baseline/{name}" for name in self.baselines)
        for name in self.presets:
            for member, attack in presets.preset(name, sources, has_gate=True).items():
                # prefixed with the preset if the list has other settings under the plain name
                attacks[member if attacks.get(member, attack) == attack else f"{name}.{member}"] = attack
        return attacks


def applicable_attacks(
    attacks: Mapping[str, AttackSettings], has_gate: bool, known: Container[str]
) -> dict[str, AttackSettings]:
    """Returns the attacks that can run on a model; a transfer attack keeps those of its sources that are `known`."""
    applicable: dict[str, AttackSettings] = {}
    for name, attack in attacks.items():
        if registry.REGISTRY[type(attack)].needs_gate and not has_gate:
            continue
        if not isinstance(attack, Transfer):
            applicable[name] = attack
        elif sources := tuple(source for source in attack.sources if source in known):
            applicable[name] = attack.model_copy(update={"sources": sources})
    return applicable


def robustness_curve(
    target: EvaluationTarget, grid: EpsilonGrid, config: EvaluationConfig
) -> Iterator[tuple[float, Proportion]]:
    """Yields (L-inf epsilon, accuracy under the grid's attack)."""
    for epsilon in grid.epsilons:
        grid_config = EvaluationConfig(
            LInf(epsilon), config.seed, config.precision, config.batch_size, config.drop_fallen, {}
        )
        attacks: dict[str, AttackSettings] = {grid.attack.kind: grid.attack}
        result = evaluate(target, attacks, grid_config)
        yield epsilon, result.accuracies()[WORST]
        clear_resume_state(target, attacks, grid_config)

"""The `poison` section of params.yaml."""

from typing import Annotated

from pydantic import Field, model_validator

from advmoe.attacks.pgd import Pgd
from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Seed, Settings
from advmoe.threats.poisoning.detectors.registry import Detector
from advmoe.threats.poisoning.registry import WHOLE_SET_ATTACKS, PoisonAttack


class Study(Settings):
    """One attack and the victims that are trained on its poisoned sets.

    `rates`: shares of the training set or of a class, depending on the attack; `victims`: `mixture` (experts and gate
    are trained on the poisoned set), `mixture-joint` (only the joint phase is: the weaker threat model), or baselines;
    `seeds`: offsets to the project's seed; at 0 the pipeline's own models are the clean twins; `defences`: names in
    `poison.defence`; for each of them every victim is retrained without the images that it flags.
    """

    attack: PoisonAttack
    rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    victims: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    defences: tuple[str, ...]

    @model_validator(mode="after")
    def _check_values(self) -> "Study":
        if max(self.rates) == 1 and not isinstance(self.attack, WHOLE_SET_ATTACKS):
            raise ValueError(f"rates must lie between 0 and 1 for {self.attack.kind}, which leaves some images clean")
        for name in ("rates", "victims", "seeds", "defences"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} contains duplicates")
        return self


class Common(Settings):
    """Settings that all studies share.

    `images`: number of test images, null for all; `robust`: the attack that measures robust accuracy, at the top-level
    epsilon; `proxy_seed`: seed of the attacker's networks, which no victim has; `defence`: detectors by name.
    """

    images: PositiveInt | None
    robust: Pgd
    proxy_seed: Seed
    defence: dict[str, Detector]


class PoisonSection(Common):
    """The whole section; every study in `attacks` is a separate stage."""

    attacks: Annotated[dict[str, Study], Field(min_length=1)]

    @property
    def common(self) -> Common:
        """The shared settings without `attacks`: a study's checkpoints do not depend on the other studies."""
        return Common(**{name: getattr(self, name) for name in Common.model_fields})

    def named(self, name: str) -> Study:
        """Returns a study by name. Raises UserError when there is none."""
        if name not in self.attacks:
            raise UserError(f"poison.attacks has no '{name}'; there are {files.join_names(self.attacks)}")
        return self.attacks[name]

    @model_validator(mode="after")
    def _check_defences(self) -> "PoisonSection":
        for name, study in self.attacks.items():
            unknown = [defence for defence in study.defences if defence not in self.defence]
            if unknown:
                raise ValueError(
                    f"attacks.{name}.defences lists '{unknown[0]}', but defence has only {', '.join(self.defence)}"
                )
        return self

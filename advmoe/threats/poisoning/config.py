"""The `poison` section of params.yaml."""

from typing import Annotated

from pydantic import Field, model_validator

from advmoe.attacks.pgd import Pgd
from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Seed, Settings
from advmoe.threats.poisoning.detectors.registry import Defence
from advmoe.threats.poisoning.registry import WHOLE_SET, Poison


class Study(Settings):
    """One attack and whom it is tried on.

    `rates`: shares of what the attack's file names (the training set or a class); `victims`: `mixture` (experts and
    gate learn from the poison), `mixture-joint` (only the joint phase does: the weaker threat model), or baselines;
    `seeds`: added to the project's seed, 0 being the pipeline's own, whose models are the clean twins; `defences`: of
    `poison.defence`, each of which gets a victim retrained without what it flagged.
    """

    attack: Poison
    rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    victims: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    defences: tuple[str, ...]

    @model_validator(mode="after")
    def _sound(self) -> "Study":
        if max(self.rates) == 1 and not isinstance(self.attack, WHOLE_SET):
            raise ValueError(f"rates must lie between 0 and 1 for {self.attack.kind}, which leaves some images clean")
        for name in ("rates", "victims", "seeds", "defences"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists something twice")
        return self


class Common(Settings):
    """What all studies share.

    `images`: so many test images, null for all; `robust`: the attack behind robust accuracy, at the top-level epsilon;
    `proxy_seed`: where the attacker's networks start, never a victim's; `defence`: detectors by name.
    """

    images: PositiveInt | None
    robust: Pgd
    proxy_seed: Seed
    defence: dict[str, Defence]


class PoisonSection(Common):
    """All of it: a stage of its own for every attack."""

    attacks: Annotated[dict[str, Study], Field(min_length=1)]

    def named(self, name: str) -> Study:
        """The study of that name. Raises UserError when there is none."""
        if name not in self.attacks:
            raise UserError(f"poison.attacks has no '{name}'; there are {files.names(self.attacks)}")
        return self.attacks[name]

    @model_validator(mode="after")
    def _known_defences(self) -> "PoisonSection":
        for name, study in self.attacks.items():
            strangers = [defence for defence in study.defences if defence not in self.defence]
            if strangers:
                raise ValueError(
                    f"attacks.{name}.defences lists '{strangers[0]}', but defence has only {', '.join(self.defence)}"
                )
        return self

"""The `extract` section of params.yaml."""

from typing import Annotated

from pydantic import Field, model_validator

from advmoe.attacks.pgd import Pgd
from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Seed, Settings
from advmoe.models.classifiers import Backbone
from advmoe.threats.extraction.oracle import Answers
from advmoe.threats.extraction.prada import Prada
from advmoe.threats.extraction.registry import BY_SHARES, Extraction
from advmoe.training.config import TrainingConfig


class Study(Settings):
    """One attack and whom it is tried on.

    `answers`: what the victim tells; `budgets`: queries, one an image, the smaller ones being the first queries of the
    largest; `victims`: `mixture`, a baseline, `expert/NAME`; `surrogates`: of `extract.surrogates`, the first of which
    also serves attacks that train networks in between; `seeds`: added to the project's.
    """

    attack: Extraction
    answers: Annotated[tuple[Answers, ...], Field(min_length=1)]
    budgets: Annotated[tuple[Annotated[int, Field(ge=2, strict=True)], ...], Field(min_length=1)]
    victims: Annotated[tuple[str, ...], Field(min_length=1)]
    surrogates: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _sound(self) -> "Study":
        for name in ("answers", "budgets", "victims", "surrogates", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists something twice")
        if len(self.budgets) > 1 and isinstance(self.attack, BY_SHARES):
            raise ValueError(f"budgets: {self.attack.kind} plans its rounds for one; give others a study of their own")
        return self


class Common(Settings):
    """What all studies share.

    `images`: so many test images, null for all; `noise`: so many uniform images; `robust`: PGD on victims and
    surrogates, at the top-level epsilon; `detector`: looks at the queries; `surrogates`: networks by name; `recipe`: of
    them all, for its epochs or for at least so many `steps` of the optimiser.
    """

    images: PositiveInt | None
    noise: PositiveInt
    robust: Pgd
    detector: Prada
    surrogates: Annotated[dict[str, Backbone], Field(min_length=1)]
    steps: PositiveInt
    recipe: TrainingConfig


class ExtractSection(Common):
    """All of it: a stage of its own for every attack."""

    attacks: Annotated[dict[str, Study], Field(min_length=1)]

    def named(self, name: str) -> Study:
        """The study of that name. Raises UserError when there is none."""
        if name not in self.attacks:
            raise UserError(f"extract.attacks has no '{name}'; there are {files.names(self.attacks)}")
        return self.attacks[name]

    @model_validator(mode="after")
    def _known_surrogates(self) -> "ExtractSection":
        for name, study in self.attacks.items():
            strangers = [each for each in study.surrogates if each not in self.surrogates]
            if strangers:
                raise ValueError(
                    f"attacks.{name}.surrogates lists '{strangers[0]}', but surrogates has only "
                    f"{files.names(self.surrogates)}"
                )
        return self

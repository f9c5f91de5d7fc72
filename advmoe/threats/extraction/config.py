"""The `extract` section of params.yaml."""

from typing import Annotated

from pydantic import Field, model_validator

from advmoe.attacks.pgd import Pgd
from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Seed, Settings
from advmoe.models.classifiers import BackboneSettings
from advmoe.threats.extraction.oracle import AnswerMode
from advmoe.threats.extraction.prada import Prada
from advmoe.threats.extraction.registry import SINGLE_BUDGET_ATTACKS, Extraction
from advmoe.training.config import TrainingConfig


class Study(Settings):
    """One attack and the victims that it is run on.

    `answers`: answer modes; `budgets`: numbers of queries, one per image, of which smaller ones are the first queries
    of the largest; `victims`: `mixture`, a baseline, `expert/NAME`; `surrogates`: names in `extract.surrogates`, of
    which the first is also trained during an attack; `seeds`: added to the project's seed.
    """

    attack: Extraction
    answers: Annotated[tuple[AnswerMode, ...], Field(min_length=1)]
    budgets: Annotated[tuple[Annotated[int, Field(ge=2, strict=True)], ...], Field(min_length=1)]
    victims: Annotated[tuple[str, ...], Field(min_length=1)]
    surrogates: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _sound(self) -> "Study":
        for name in ("answers", "budgets", "victims", "surrogates", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} contains duplicates")
        if len(self.budgets) > 1 and isinstance(self.attack, SINGLE_BUDGET_ATTACKS):
            raise ValueError(f"budgets: {self.attack.kind} depends on the whole budget; define one attack per budget")
        return self


class Common(Settings):
    """Settings shared by all studies.

    `images`: number of test images, null for all; `noise`: number of uniform noise images; `robust`: PGD on victims and
    surrogates, at the top-level epsilon; `detector`: detects extraction queries; `surrogates`: networks by name;
    `recipe`: training of all surrogates, extended to at least `steps` optimiser steps.
    """

    images: PositiveInt | None
    noise: PositiveInt
    robust: Pgd
    detector: Prada
    surrogates: Annotated[dict[str, BackboneSettings], Field(min_length=1)]
    steps: PositiveInt
    recipe: TrainingConfig


class ExtractSection(Common):
    """The section: shared settings, and the attacks by name; each attack is a DVC stage of its own."""

    attacks: Annotated[dict[str, Study], Field(min_length=1)]

    @property
    def common(self) -> Common:
        """The shared settings without `attacks`: a study's checkpoints do not depend on the other studies."""
        return Common(**{name: getattr(self, name) for name in Common.model_fields})

    def named(self, name: str) -> Study:
        """Returns the study of that name. Raises UserError when there is none."""
        if name not in self.attacks:
            raise UserError(f"extract.attacks has no '{name}'; there are {files.join_names(self.attacks)}")
        return self.attacks[name]

    @model_validator(mode="after")
    def _known_surrogates(self) -> "ExtractSection":
        for name, study in self.attacks.items():
            unknown = [surrogate for surrogate in study.surrogates if surrogate not in self.surrogates]
            if unknown:
                raise ValueError(
                    f"attacks.{name}.surrogates lists '{unknown[0]}', but surrogates has only "
                    f"{files.join_names(self.surrogates)}"
                )
        return self

"""What a check is given, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from advmoe.attacks.catalogue import AnyAttack
from advmoe.evaluation.harness import Measured, Target, Terms
from advmoe.params import PositiveInt, Settings

Status = Literal["pass", "warn", "fail", "not checked"]


class Probes(Settings):
    """How much the checks may spend. `images`: so many images are attacked again; `steps`: of those attacks, twice as
    many where more steps are compared; `samples`: random points of the ball that a planted read-out learns from.
    """

    images: PositiveInt
    steps: PositiveInt
    samples: PositiveInt


@dataclass(frozen=True)
class Case:
    """An evaluation under suspicion: the model with its images, the attacks it met, what came out, on which terms.

    `training`: content hashes of the training images, None when they are not at hand.
    """

    target: Target
    attacks: Mapping[str, AnyAttack]
    measured: Measured
    terms: Terms
    probes: Probes
    training: frozenset[str] | None


@dataclass(frozen=True)
class Finding:
    """The answer of one check: a sentence for people, and the numbers behind it."""

    check: str
    status: Status
    sentence: str
    evidence: dict[str, Any]

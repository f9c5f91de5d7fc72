"""What a check is given, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from advmoe.attacks.registry import AnyAttack
from advmoe.core.settings import PositiveInt, Settings
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget

Status = Literal["pass", "warn", "fail", "not checked"]


class Probes(Settings):
    """How much the checks may spend. `images`: so many images are attacked again; `steps`: of those attacks, twice as
    many where more steps are compared; `samples`: random points of the ball that a planted read-out learns from.
    """

    images: PositiveInt
    steps: PositiveInt
    samples: PositiveInt


@dataclass(frozen=True)
class CheckContext:
    """An evaluation under suspicion: the model with its images, the attacks it met, what came out, on which terms.

    `training`: content hashes of the training images, None when they are not at hand.
    """

    target: EvaluationTarget
    attacks: Mapping[str, AnyAttack]
    measured: EvaluationResult
    terms: EvaluationConfig
    probes: Probes
    training: frozenset[str] | None


@dataclass(frozen=True)
class CheckResult:
    """The answer of one check: a sentence for people, and the numbers behind it."""

    check: str
    status: Status
    sentence: str
    evidence: dict[str, Any]

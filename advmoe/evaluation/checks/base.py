"""Input, settings and result of a check."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from advmoe.attacks.registry import AttackSettings
from advmoe.core.settings import PositiveInt, Settings
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget

Status = Literal["pass", "warn", "fail", "not checked"]


class CheckSettings(Settings):
    """Cost of the checks. `images`: number of images that are attacked again; `steps`: of those attacks, doubled where
    more steps are compared; `samples`: random points per image to which the binarisation test fits its read-out.
    """

    images: PositiveInt
    steps: PositiveInt
    samples: PositiveInt


@dataclass(frozen=True)
class CheckContext:
    """The evaluation to check: the model with its images, the attacks, their result, and the configuration.

    `training_hashes`: content hashes of the training images, None if they are not available.
    """

    target: EvaluationTarget
    attacks: Mapping[str, AttackSettings]
    result: EvaluationResult
    config: EvaluationConfig
    settings: CheckSettings
    training_hashes: frozenset[str] | None


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: its id, status, a sentence that explains it, and the numbers behind it."""

    check: str
    status: Status
    sentence: str
    evidence: dict[str, Any]

"""Gate weights under attack, and the accuracy of oracle routing.

Shapes: N images, E experts, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.evaluation.harness import DECISION_BATCH, EvaluationResult, EvaluationTarget
from advmoe.models import inference
from advmoe.models.gate_statistics import entropy, gate_weights, total_variation
from advmoe.models.mixture import MixtureOfExperts
from advmoe.statistics.decisions import CLEAN
from advmoe.statistics.intervals import Proportion

DIGITS = 6


def gate_weights_by_attack(
    target: EvaluationTarget, result: EvaluationResult, experts: Sequence[str]
) -> dict[str, Any]:
    """Returns gate statistics, clean and under each attack: mean weight per expert, entropy, shift from clean."""
    mixture = _mixture(target)
    clean_NE = gate_weights(mixture, target.images)
    report = {CLEAN: _weight_summary(clean_NE, clean_NE, experts)}
    for name, outcome in result.outcomes.items():
        report[name] = _weight_summary(gate_weights(mixture, outcome.images.to(target.images)), clean_NE, experts)
    return report


def _weight_summary(weights_NE: Tensor, clean_NE: Tensor, experts: Sequence[str]) -> dict[str, Any]:
    means = weights_NE.mean(dim=0).tolist()
    return {
        "mean_weight": {name: round(mean, DIGITS) for name, mean in zip(experts, means, strict=True)},
        "entropy": round(float(entropy(weights_NE)), DIGITS),
        "shift": round(float(total_variation(weights_NE, clean_NE)), DIGITS),
    }


def oracle_accuracy(target: EvaluationTarget, result: EvaluationResult) -> dict[str, dict[str, float]]:
    """Returns the share of images that at least one expert classifies correctly, clean and under each attack.

    This is an upper bound for any gate on these images. The attacks target the actual gate, so it does not bound the
    robust accuracy of another gate.
    """
    mixture = _mixture(target)
    correct = {CLEAN: _any_expert_correct(mixture, target.images, target.labels)}
    for name, outcome in result.outcomes.items():
        correct[name] = _any_expert_correct(mixture, outcome.images.to(target.images), target.labels)[: outcome.limit]
    return {name: Proportion.from_mask(correct_N).as_dict() for name, correct_N in correct.items()}


def _any_expert_correct(mixture: MixtureOfExperts, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    predicted_NE = torch.stack(
        [inference.predict(expert, images_NCHW, DECISION_BATCH).argmax(1) for expert in mixture.experts], dim=1
    )
    return (predicted_NE == labels_N[:, None]).any(dim=1)


def _mixture(target: EvaluationTarget) -> MixtureOfExperts:
    assert isinstance(target.model, MixtureOfExperts)
    return target.model

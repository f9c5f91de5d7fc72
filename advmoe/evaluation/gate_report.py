"""What the gate does under attack, and what the best possible gate could do.

Shapes: N images, E experts, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.evaluation.harness import DECISION_BATCH, EvaluationResult, EvaluationTarget
from advmoe.models import inference
from advmoe.models.gate_statistics import entropy, gate_weights, shift
from advmoe.models.mixture import MixtureOfExperts
from advmoe.statistics.decisions import CLEAN
from advmoe.statistics.intervals import Share

DIGITS = 6


def weights(target: EvaluationTarget, measured: EvaluationResult, experts: Sequence[str]) -> dict[str, Any]:
    """Gate weights on clean images and under each attack: mean per expert, entropy, shift away from clean."""
    mixture = _mixture(target)
    clean_NE = gate_weights(mixture, target.images)
    report = {CLEAN: _weights(clean_NE, clean_NE, experts)}
    for name, outcome in measured.outcomes.items():
        report[name] = _weights(gate_weights(mixture, outcome.images.to(target.images)), clean_NE, experts)
    return report


def _weights(weights_NE: Tensor, clean_NE: Tensor, experts: Sequence[str]) -> dict[str, Any]:
    means = weights_NE.mean(dim=0).tolist()
    return {
        "mean_weight": {name: round(mean, DIGITS) for name, mean in zip(experts, means, strict=True)},
        "entropy": round(float(entropy(weights_NE)), DIGITS),
        "shift": round(float(shift(weights_NE, clean_NE)), DIGITS),
    }


def oracle_routing(target: EvaluationTarget, measured: EvaluationResult) -> dict[str, dict[str, float]]:
    """Share of images, clean and under each attack on the mixture, that at least one of its experts gets right.

    No gate could do better on these images; the attacks were made against the gate that is there, so another one would
    meet other attacks, and this is a bound for re-routing only.
    """
    mixture = _mixture(target)
    found = {CLEAN: _any_right(mixture, target.images, target.labels)}
    for name, outcome in measured.outcomes.items():
        found[name] = _any_right(mixture, outcome.images.to(target.images), target.labels)[: outcome.limit]
    return {name: Share.of(right).as_dict() for name, right in found.items()}


def _any_right(mixture: MixtureOfExperts, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    votes_NE = torch.stack(
        [inference.predict(expert, images_NCHW, DECISION_BATCH).argmax(1) for expert in mixture.experts], dim=1
    )
    return (votes_NE == labels_N[:, None]).any(dim=1)


def _mixture(target: EvaluationTarget) -> MixtureOfExperts:
    assert isinstance(target.model, MixtureOfExperts)
    return target.model

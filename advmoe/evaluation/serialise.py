"""What is kept of an evaluation: numbers for metrics, and every decision and adversarial image for whoever doubts them.

Shapes: N images, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.registry import AnyAttack
from advmoe.data.dataset import Split
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult
from advmoe.evaluation.verdict import Verdict
from advmoe.statistics import decisions as decision_files
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Share

DIGITS = 6


def numbers(
    measured: EvaluationResult,
    attacks: Mapping[str, AnyAttack],
    terms: EvaluationConfig,
    class_names: Sequence[str],
    verdict: Verdict | None,
) -> dict[str, Any]:
    """Everything about one model that equal runs agree on, for JSON. A failed check withholds the attacked numbers."""
    withheld = verdict is not None and verdict.status == "fail"
    return {
        "accuracy": accuracies(measured, withheld),
        "verdict": "not asked" if verdict is None else verdict.status,
        "withheld": verdict.reasons if verdict is not None else [],
        "terms": {"precision": terms.precision, "drop_fallen": terms.drop_fallen, "seed": terms.seed},
        "attacks": {
            name: {
                "settings": attacks[name].model_dump(mode="json"),
                "images": outcome.limit,
                "attacked": int(outcome.attacked.sum()),
                "fell": int((outcome.attacked & ~outcome.correct).sum()),
                "forward": outcome.forward,
                "backward": outcome.backward,
            }
            for name, outcome in measured.outcomes.items()
        },
        "per_class": {} if withheld else per_class(measured, class_names),
    }


def accuracies(measured: EvaluationResult, withheld: bool) -> dict[str, dict[str, float] | None]:
    """Shares for JSON; None for what is withheld."""
    return {name: None if withheld and name != CLEAN else share.as_dict() for name, share in measured.shares().items()}


def per_class(measured: EvaluationResult, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Clean and worst-case accuracy of each class that occurs."""
    correct = measured.correct
    report: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(class_names):
        members = measured.labels == label
        if members.any():
            report[name] = {kind: Share.of(correct[kind][members]).as_dict() for kind in (CLEAN, WORST)}
    return report


def decision_rows(measured: EvaluationResult, split: Split) -> list[dict[str, int | str]]:
    """Rows of the decision file of one model; `split` holds the evaluated images in the same order."""
    assert measured.labels.tolist() == split.labels.tolist(), "decisions about other images"
    correct: dict[str, list[int]] = {}
    for kind, correct_N in measured.correct.items():
        met = measured.outcomes[kind].limit if kind in measured.outcomes else len(split)
        correct[kind] = correct_N[:met].int().tolist()
    return decision_files.rows(split.index.tolist(), split.labels.tolist(), correct)


def decisions(name: str, measured: EvaluationResult, with_images: bool) -> dict[str, Tensor]:
    """Tensors for a safetensors file, under `<model>.<attack>.<what>`."""
    tensors = {f"{name}.{kind}.correct": correct for kind, correct in measured.correct.items()}
    for kind, outcome in measured.outcomes.items():
        tensors[f"{name}.{kind}.attacked"] = outcome.attacked
        tensors[f"{name}.{kind}.predicted"] = outcome.predicted.to(torch.int64)
        if with_images:
            tensors[f"{name}.{kind}.images"] = outcome.images
    return tensors


def timings(name: str, measured: EvaluationResult) -> dict[str, float]:
    """Seconds of each attack: of the circumstances, not of the results."""
    return {f"{name}.{kind}": outcome.seconds for kind, outcome in measured.outcomes.items()}

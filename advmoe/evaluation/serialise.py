"""Converts evaluation results to JSON metrics, decision files, and tensors of adversarial images.

Shapes: N images, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.registry import AttackSettings
from advmoe.data.dataset import Split
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult
from advmoe.evaluation.verdict import Verdict
from advmoe.statistics import decisions as decision_files
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Proportion

DIGITS = 6


def model_metrics(
    result: EvaluationResult,
    attacks: Mapping[str, AttackSettings],
    config: EvaluationConfig,
    class_names: Sequence[str],
    verdict: Verdict | None,
) -> dict[str, Any]:
    """Returns the reproducible numbers of one model, for JSON. A failed check withholds accuracies under attack."""
    withheld = verdict is not None and verdict.status == "fail"
    return {
        "accuracy": accuracies(result, withheld),
        "verdict": "not asked" if verdict is None else verdict.status,
        "withheld": verdict.reasons if verdict is not None else [],
        "terms": {"precision": config.precision, "drop_fallen": config.drop_fallen, "seed": config.seed},
        "attacks": {
            name: {
                "settings": attacks[name].model_dump(mode="json"),
                "images": outcome.limit,
                "attacked": int(outcome.attacked.sum()),
                "fell": int((outcome.attacked & ~outcome.correct).sum()),
                "forward": outcome.forward,
                "backward": outcome.backward,
            }
            for name, outcome in result.outcomes.items()
        },
        "per_class": {} if withheld else per_class_accuracy(result, class_names),
    }


def accuracies(result: EvaluationResult, withheld: bool) -> dict[str, dict[str, float] | None]:
    """Returns accuracies for JSON, None where withheld."""
    return {
        name: None if withheld and name != CLEAN else share.as_dict() for name, share in result.accuracies().items()
    }


def per_class_accuracy(result: EvaluationResult, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns clean and worst-case accuracy of each class that occurs."""
    correct = result.correct
    report: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(class_names):
        members = result.labels == label
        if members.any():
            report[name] = {kind: Proportion.from_mask(correct[kind][members]).as_dict() for kind in (CLEAN, WORST)}
    return report


def decision_rows(result: EvaluationResult, split: Split) -> list[dict[str, int | str]]:
    """Returns the rows of the decision file of one model; `split` holds the evaluated images in the same order."""
    assert result.labels.tolist() == split.labels.tolist(), "decisions are for other images"
    correct: dict[str, list[int]] = {}
    for kind, correct_N in result.correct.items():
        limit = result.outcomes[kind].limit if kind in result.outcomes else len(split)
        correct[kind] = correct_N[:limit].int().tolist()
    return decision_files.rows(split.index.tolist(), split.labels.tolist(), correct)


def decision_tensors(name: str, result: EvaluationResult, with_images: bool) -> dict[str, Tensor]:
    """Returns tensors for a safetensors file, named `<model>.<attack>.<field>`."""
    tensors = {f"{name}.{kind}.correct": correct for kind, correct in result.correct.items()}
    for kind, outcome in result.outcomes.items():
        tensors[f"{name}.{kind}.attacked"] = outcome.attacked
        tensors[f"{name}.{kind}.predicted"] = outcome.predicted.to(torch.int64)
        if with_images:
            tensors[f"{name}.{kind}.images"] = outcome.images
    return tensors


def timings(name: str, result: EvaluationResult) -> dict[str, float]:
    """Returns the seconds of each attack; they depend on the machine and are kept apart from the results."""
    return {f"{name}.{kind}": outcome.seconds for kind, outcome in result.outcomes.items()}

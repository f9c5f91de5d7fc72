"""Plot data of an evaluation, for `dvc plots`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.core import files, paths
from advmoe.evaluation.summary import MIXTURE, ModelResult
from advmoe.statistics.decisions import CLEAN, WORST

STAGE = "evaluate"


def write_plots(results: Mapping[str, ModelResult], gate: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Writes all files of plots/evaluate/."""
    with_verdict = {name: result for name, result in results.items() if result.verdict is not None}
    _robustness(with_verdict)
    _minimal(with_verdict)
    _matrix(results)
    _gate(gate)
    _confusion(results[MIXTURE], class_names)


def _robustness(with_verdict: Mapping[str, ModelResult]) -> None:
    epsilons = next(iter(with_verdict.values())).robustness_curve
    rows = [
        {
            "epsilon": epsilon,
            **{name: result.robustness_curve[epsilon].accuracy for name, result in with_verdict.items()},
        }
        for epsilon in epsilons
    ]
    files.write_csv(paths.plots(STAGE, "robustness"), rows)


def _minimal(with_verdict: Mapping[str, ModelResult]) -> None:
    """One row per image and model: its smallest adversarial epsilon, and the accuracy from there on."""
    rows: list[dict[str, Any]] = []
    for name, result in with_verdict.items():
        bounds = sorted(result.minimal_epsilons.tolist())
        finite = [bound for bound in bounds if math.isfinite(bound)]
        rows += [
            {"model": name, "epsilon": round(bound, 6), "accuracy": round(1 - rank / len(bounds), 6)}
            for rank, bound in enumerate(finite, start=1)
        ]
    files.write_csv(paths.plots(STAGE, "minimal-epsilon"), rows or [{"model": "", "epsilon": 0.0, "accuracy": 1.0}])


def _matrix(results: Mapping[str, ModelResult]) -> None:
    """Accuracy of every model under every attack, empty where the attack was not run."""
    kinds = list(results[MIXTURE].evaluation.correct)
    rows = []
    for name, result in results.items():
        shares = result.evaluation.accuracies()
        rows.append({"model": name, **{kind: shares[kind].accuracy if kind in shares else "" for kind in kinds}})
    files.write_csv(paths.plots(STAGE, "matrix"), rows)


def _gate(gate: Mapping[str, Any]) -> None:
    rows = [
        {"expert": name, **{kind: report["mean_weight"][name] for kind, report in gate.items()}}
        for name in gate[CLEAN]["mean_weight"]
    ]
    files.write_csv(paths.plots(STAGE, "gate"), rows)


def _confusion(mixture: ModelResult, class_names: Sequence[str]) -> None:
    """Clean and worst case: the prediction under the first attack that fools the model."""
    evaluation = mixture.evaluation
    clean = evaluation.clean_logits.argmax(1)
    worst = clean.clone()
    for outcome in reversed(evaluation.outcomes.values()):
        misclassified = outcome.attacked & ~outcome.correct
        worst[misclassified] = outcome.predicted[misclassified]
    for kind, predicted in ((CLEAN, clean), (WORST, worst)):
        pairs = zip(evaluation.labels.tolist(), predicted.tolist(), strict=True)
        rows = [{"actual": class_names[actual], "predicted": class_names[prediction]} for actual, prediction in pairs]
        files.write_csv(paths.plots(STAGE, f"confusion-{kind}"), rows)

"""Plot data of an evaluation, for `dvc plots`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.core import files, paths
from advmoe.evaluation.summary import MIXTURE, ModelResult
from advmoe.statistics.decisions import CLEAN, WORST

STAGE = "evaluate"


def write(results: Mapping[str, ModelResult], gate: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """All of plots/evaluate/."""
    judged = {name: result for name, result in results.items() if result.verdict is not None}
    _robustness(judged)
    _minimal(judged)
    _matrix(results)
    _gate(gate)
    _confusion(results[MIXTURE], class_names)


def _robustness(judged: Mapping[str, ModelResult]) -> None:
    radii = next(iter(judged.values())).curve
    rows = [
        {"epsilon": radius, **{name: result.curve[radius].accuracy for name, result in judged.items()}}
        for radius in radii
    ]
    files.write_csv(paths.plots(STAGE, "robustness"), rows)


def _minimal(judged: Mapping[str, ModelResult]) -> None:
    """One row for each image and model: the epsilon at which it falls, and the accuracy that is left from there on."""
    rows: list[dict[str, Any]] = []
    for name, result in judged.items():
        bounds = sorted(result.minimal.tolist())
        finite = [bound for bound in bounds if math.isfinite(bound)]
        rows += [
            {"model": name, "epsilon": round(bound, 6), "accuracy": round(1 - place / len(bounds), 6)}
            for place, bound in enumerate(finite, start=1)
        ]
    files.write_csv(paths.plots(STAGE, "minimal-epsilon"), rows or [{"model": "", "epsilon": 0.0, "accuracy": 1.0}])


def _matrix(results: Mapping[str, ModelResult]) -> None:
    """Accuracy of every model under every attack, empty where they did not meet."""
    kinds = list(results[MIXTURE].measured.correct)
    rows = []
    for name, result in results.items():
        shares = result.measured.shares()
        rows.append({"model": name, **{kind: shares[kind].accuracy if kind in shares else "" for kind in kinds}})
    files.write_csv(paths.plots(STAGE, "matrix"), rows)


def _gate(gate: Mapping[str, Any]) -> None:
    rows = [
        {"expert": name, **{kind: report["mean_weight"][name] for kind, report in gate.items()}}
        for name in gate[CLEAN]["mean_weight"]
    ]
    files.write_csv(paths.plots(STAGE, "gate"), rows)


def _confusion(mixture: ModelResult, class_names: Sequence[str]) -> None:
    """Clean, and in the worst case: the prediction under the first attack that an image falls to."""
    measured = mixture.measured
    clean = measured.clean_logits.argmax(1)
    worst = clean.clone()
    for outcome in reversed(measured.outcomes.values()):
        fell = outcome.attacked & ~outcome.correct
        worst[fell] = outcome.predicted[fell]
    for kind, predicted in ((CLEAN, clean), (WORST, worst)):
        pairs = zip(measured.labels.tolist(), predicted.tolist(), strict=True)
        rows = [{"actual": class_names[actual], "predicted": class_names[guess]} for actual, guess in pairs]
        files.write_csv(paths.plots(STAGE, f"confusion-{kind}"), rows)

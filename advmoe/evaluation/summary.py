"""Metrics files of the pipeline's evaluation, and their tables on the console."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.registry import AttackSettings
from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import format_epsilon
from advmoe.evaluation.harness import EvaluationResult, EvaluationTarget
from advmoe.evaluation.verdict import Verdict
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Proportion

SCHEMA = 2
DIGITS = 6
MIXTURE = "mixture"
UNIFORM = "uniform-average"
BEFORE = "before-joint"
BASELINE = "baseline/"
PRETRAINED = "expert/"  # an expert after pre-training
JOINT = "joint-expert/"  # the same expert after joint training
DISPLAY_NAMES = {
    MIXTURE: "mixture",
    UNIFORM: "uniform average, no gate",
    BEFORE: "before joint training",
}
WITHHELD = "withheld"


@dataclass
class ModelResult:
    """Results of one model; with a verdict, also accuracy by epsilon and `minimal_epsilons` (N,).

    `comparisons`: paired comparisons with other models; `metrics`, `extra`: entries of its file in metrics/evaluate/.
    """

    target: EvaluationTarget
    attacks: dict[str, AttackSettings]
    evaluation: EvaluationResult
    verdict: Verdict | None = None
    robustness_curve: dict[float, Proportion] = field(default_factory=dict)
    minimal_epsilons: Tensor = field(default_factory=lambda: torch.zeros(0))
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def withheld(self) -> bool:
        """Whether a failed check withholds the robust accuracy."""
        return self.verdict is not None and self.verdict.status == "fail"


def is_expert(name: str) -> bool:
    """Whether a model name is that of a single expert."""
    return name.startswith((PRETRAINED, JOINT))


def model_names(experts: Sequence[str], baselines: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of all evaluated models."""
    plain = (BASELINE + name for name in baselines)
    parts = (prefix + name for prefix in (PRETRAINED, JOINT) for name in experts)
    return (MIXTURE, UNIFORM, BEFORE, *plain, *parts)


def report_path(name: str) -> Path:
    """Returns the path of the metrics file of one model."""
    return paths.EVALUATION / f"{name.replace('/', '-')}.json"


def model_report(name: str, result: ModelResult, epsilon: float) -> dict[str, Any]:
    """Returns the content of the file of one model in metrics/evaluate/."""
    content: dict[str, Any] = {"schema_version": SCHEMA, "model": name, "epsilon": epsilon, **result.metrics}
    if result.verdict is not None and not result.withheld:
        content["grid"] = {format_epsilon(radius): share.as_dict() for radius, share in result.robustness_curve.items()}
        content["median_minimal_epsilon"] = _finite(float(result.minimal_epsilons.median()))
    return content | result.extra | ({"against": result.comparisons} if result.comparisons else {})


def summarise(results: Mapping[str, ModelResult], epsilon: float) -> dict[str, Any]:
    """Returns the headline accuracies (metrics/evaluate.json); the best expert has the highest worst-case accuracy."""
    experts = [name for name in results if name.startswith(PRETRAINED)]
    shares = {name: result.evaluation.accuracies() for name, result in results.items()}
    best = max(experts, key=lambda name: (shares[name][WORST].accuracy, shares[name][CLEAN].accuracy))
    return {
        "schema_version": SCHEMA,
        "epsilon": epsilon,
        "images": shares[MIXTURE][CLEAN].total,
        "verdict": {name: result.verdict.status for name, result in results.items() if result.verdict},
        **{name: _headline(results[name]) for name in results if not is_expert(name)},
        "best-expert": {"name": best.removeprefix(PRETRAINED)} | _headline(results[best]),
        "grid": {
            name: {format_epsilon(radius): share.accuracy for radius, share in result.robustness_curve.items()}
            for name, result in results.items()
            if result.verdict is not None and not result.withheld
        },
    }


def _headline(result: ModelResult) -> dict[str, float | None]:
    return {
        kind: None if result.withheld and kind != CLEAN else share.accuracy
        for kind, share in result.evaluation.accuracies().items()
    }


def _finite(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def show() -> None:
    """Prints the results of the last evaluation and their paths. Raises UserError if there are none."""
    head = files.read_json(paths.SUMMARY)
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA:
        raise UserError(f"{paths.SUMMARY}: not a result of this version of advmoe; run `dvc repro evaluate`")
    reports = [_read(path) for path in sorted(paths.EVALUATION.glob("*.json"))]
    if not reports:
        raise UserError(f"{paths.EVALUATION}: contains no results; run `dvc repro evaluate`")
    with files.report_malformed(paths.EVALUATION):
        _show(head, reports)
    console.info(
        f"numbers: {paths.SUMMARY}, {paths.EVALUATION}/   checks: {paths.VERDICT}   plots: `dvc plots show`   "
        f"models: {paths.ARTIFACTS}/"
    )
    console.info("next: `advmoe evaluate --attack autoattack`, `dvc exp run -S epsilon=0.15`, `advmoe --help`")


def _show(head: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    order = {name: rank for rank, name in enumerate(head)}
    reports.sort(key=lambda report: (order.get(report["model"], len(order)), report["model"]))
    subtitle = f"on {head['images']} test images, L-inf epsilon {head['epsilon']:g} = {format_epsilon(head['epsilon'])}"
    _show_models(reports, subtitle)
    _show_attacks([report for report in reports if report["verdict"] != "not asked"], subtitle)
    _show_alarms(reports)


def _show_models(reports: list[dict[str, Any]], subtitle: str) -> None:
    """Prints all models under the attacks that were run on all of them."""
    common = [kind for kind in reports[0]["accuracy"] if all(kind in report["accuracy"] for report in reports)]
    rows = [
        [
            DISPLAY_NAMES.get(report["model"], report["model"]),
            *(_cell(report, kind) for kind in common if kind != WORST),
            _cell(report, WORST) if report["verdict"] != "not asked" else "",
            report["verdict"] if report["verdict"] != "not asked" else "",
        ]
        for report in reports
    ]
    shown = [kind for kind in common if kind != WORST]
    columns = ["model", *shown, "worst case", "verdict"]
    console.table(f"accuracy in % [95 % Wilson interval] {subtitle}", columns, rows)


def _show_attacks(with_verdict: list[dict[str, Any]], subtitle: str) -> None:
    """Prints every attack, for the models with a verdict."""
    kinds = list(dict.fromkeys(kind for report in with_verdict for kind in report["accuracy"]))
    kinds.sort(key=lambda kind: (kind == WORST, kind != CLEAN))
    rows = [[kind, *(_cell(report, kind) for report in with_verdict)] for kind in kinds]
    columns = ["attack", *(DISPLAY_NAMES.get(report["model"], report["model"]) for report in with_verdict)]
    console.table(f"accuracy by attack, {subtitle}", columns, rows)


def _cell(report: dict[str, Any], kind: str) -> str:
    if kind not in report["accuracy"]:
        return "-"
    share = report["accuracy"][kind]
    return WITHHELD if share is None else str(Proportion(**share))


def _read(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA or "accuracy" not in content:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro evaluate`")
    return content


def _show_alarms(reports: list[dict[str, Any]]) -> None:
    """Prints why headlines are withheld, and the alarms of training."""
    for report in reports:
        for reason in report["withheld"]:
            console.warn(f"{report['model']}: withheld, {reason}")
    for path in sorted(paths.METRICS.glob("*/*.json")):
        content = files.read_json(path)
        for alarm in content.get("alarms", []) if isinstance(content, dict) else []:
            console.warn(alarm)

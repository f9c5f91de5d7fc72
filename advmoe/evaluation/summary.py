"""The results of the pipeline's evaluation: what the metrics hold and how they are shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.registry import AnyAttack
from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import format_epsilon
from advmoe.evaluation.harness import EvaluationResult, EvaluationTarget
from advmoe.evaluation.verdict import Verdict
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Share

SCHEMA = 2
DIGITS = 6
MIXTURE = "mixture"
UNIFORM = "uniform-average"
BEFORE = "before-joint"
BASELINE = "baseline/"
PRETRAINED = "expert/"  # an expert as pre-training left it
JOINT = "joint-expert/"  # the same expert as joint training left it
MEANING = {
    MIXTURE: "mixture",
    UNIFORM: "uniform average, no gate",
    BEFORE: "before joint training",
}
WITHHELD = "withheld"


@dataclass
class ModelResult:
    """All that is known of one model. Those that are judged have a verdict, a curve over epsilon and `minimal` (N,)."""

    target: EvaluationTarget
    attacks: dict[str, AnyAttack]
    measured: EvaluationResult
    verdict: Verdict | None = None
    curve: dict[float, Share] = field(default_factory=dict)
    minimal: Tensor = field(default_factory=lambda: torch.zeros(0))
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def withheld(self) -> bool:
        """Whether a failed check forbids to print how robust this model is."""
        return self.verdict is not None and self.verdict.status == "fail"


def is_expert(name: str) -> bool:
    """Whether a result is that of a single expert."""
    return name.startswith((PRETRAINED, JOINT))


def names(experts: Sequence[str], baselines: Sequence[str]) -> tuple[str, ...]:
    """What everything that is evaluated is called."""
    plain = (BASELINE + name for name in baselines)
    parts = (prefix + name for prefix in (PRETRAINED, JOINT) for name in experts)
    return (MIXTURE, UNIFORM, BEFORE, *plain, *parts)


def report_path(name: str) -> Path:
    """Where the report on one model lies."""
    return paths.EVALUATION / f"{name.replace('/', '-')}.json"


def report(name: str, result: ModelResult, epsilon: float) -> dict[str, Any]:
    """Everything about one model, for its file in metrics/evaluate/."""
    content: dict[str, Any] = {"schema_version": SCHEMA, "model": name, "epsilon": epsilon, **result.numbers}
    if result.verdict is not None and not result.withheld:
        content["grid"] = {format_epsilon(radius): share.as_dict() for radius, share in result.curve.items()}
        content["median_minimal_epsilon"] = _finite(float(result.minimal.median()))
    return content | result.extra | ({"against": result.against} if result.against else {})


def summary(results: Mapping[str, ModelResult], epsilon: float) -> dict[str, Any]:
    """Accuracies only, few enough to compare experiments by; the best expert is the one strongest in its worst case."""
    experts = [name for name in results if name.startswith(PRETRAINED)]
    shares = {name: result.measured.shares() for name, result in results.items()}
    best = max(experts, key=lambda name: (shares[name][WORST].accuracy, shares[name][CLEAN].accuracy))
    return {
        "schema_version": SCHEMA,
        "epsilon": epsilon,
        "images": shares[MIXTURE][CLEAN].total,
        "verdict": {name: result.verdict.status for name, result in results.items() if result.verdict},
        **{name: _headline(results[name]) for name in results if not is_expert(name)},
        "best-expert": {"name": best.removeprefix(PRETRAINED)} | _headline(results[best]),
        "grid": {
            name: {format_epsilon(radius): share.accuracy for radius, share in result.curve.items()}
            for name, result in results.items()
            if result.verdict is not None and not result.withheld
        },
    }


def _headline(result: ModelResult) -> dict[str, float | None]:
    return {
        kind: None if result.withheld and kind != CLEAN else share.accuracy
        for kind, share in result.measured.shares().items()
    }


def _finite(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def show() -> None:
    """Print the results of the last evaluation and where they lie. Raises UserError when there are none."""
    head = files.read_json(paths.SUMMARY)
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA:
        raise UserError(f"{paths.SUMMARY}: not a result of this version of advmoe; run `dvc repro evaluate`")
    reports = [_read(path) for path in sorted(paths.EVALUATION.glob("*.json"))]
    if not reports:
        raise UserError(f"{paths.EVALUATION}: holds no results; run `dvc repro evaluate`")
    with files.as_written(paths.EVALUATION):
        _show(head, reports)
    console.say(
        f"numbers: {paths.SUMMARY}, {paths.EVALUATION}/   checks: {paths.VERDICT}   plots: `dvc plots show`   "
        f"models: {paths.ARTIFACTS}/"
    )
    console.say("next: `advmoe evaluate --attack autoattack`, `dvc exp run -S epsilon=0.15`, `advmoe --help`")


def _show(head: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    order = {name: place for place, name in enumerate(head)}
    reports.sort(key=lambda each: (order.get(each["model"], len(order)), each["model"]))
    where = f"on {head['images']} test images, L-inf epsilon {head['epsilon']:g} = {format_epsilon(head['epsilon'])}"
    _show_models(reports, where)
    _show_attacks([each for each in reports if each["verdict"] != "not asked"], where)
    _show_alarms(reports)


def _show_models(reports: list[dict[str, Any]], where: str) -> None:
    """All models under the attacks that all of them met."""
    common = [kind for kind in reports[0]["accuracy"] if all(kind in each["accuracy"] for each in reports)]
    rows = [
        [
            MEANING.get(each["model"], each["model"]),
            *(_cell(each, kind) for kind in common if kind != WORST),
            _cell(each, WORST) if each["verdict"] != "not asked" else "",
            each["verdict"] if each["verdict"] != "not asked" else "",
        ]
        for each in reports
    ]
    shown = [kind for kind in common if kind != WORST]
    columns = ["model", *shown, "worst of all attacks", "verdict"]
    console.table(f"accuracy in % [95 % Wilson interval] {where}", columns, rows)


def _show_attacks(judged: list[dict[str, Any]], where: str) -> None:
    """Every attack, for the models that met all of them."""
    kinds = list(dict.fromkeys(kind for each in judged for kind in each["accuracy"]))
    kinds.sort(key=lambda kind: (kind == WORST, kind != CLEAN))
    rows = [[kind, *(_cell(each, kind) for each in judged)] for kind in kinds]
    columns = ["attack", *(MEANING.get(each["model"], each["model"]) for each in judged)]
    console.table(f"attack by attack, {where}", columns, rows)


def _cell(each: dict[str, Any], kind: str) -> str:
    if kind not in each["accuracy"]:
        return "-"
    share = each["accuracy"][kind]
    return WITHHELD if share is None else str(Share(**share))


def _read(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA or "accuracy" not in content:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro evaluate`")
    return content


def _show_alarms(reports: list[dict[str, Any]]) -> None:
    """Why headlines are withheld, and what training raised: whoever reads the results should see them too."""
    for each in reports:
        for reason in each["withheld"]:
            console.warn(f"{each['model']}: withheld, {reason}")
    for path in sorted(paths.METRICS.glob("*/*.json")):
        content = files.read_json(path)
        for alarm in content.get("alarms", []) if isinstance(content, dict) else []:
            console.warn(alarm)

"""The headline of an evaluation: what `metrics/evaluate.json` holds and how it is shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advmoe import console, files, paths
from advmoe.errors import UserError
from advmoe.evaluation.intervals import Share
from advmoe.evaluation.suite import CLEAN, WORST, Measured
from advmoe.params import format_epsilon

SCHEMA = 1
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


def is_expert(name: str) -> bool:
    """Whether a result is that of a single expert."""
    return name.startswith((PRETRAINED, JOINT))


def summary(
    measured: Mapping[str, Measured], curves: Mapping[str, Mapping[float, Share]], epsilon: float
) -> dict[str, Any]:
    """Accuracies only, few enough to compare experiments by; the best expert is the one strongest in the worst case."""
    shares = {name: outcome.shares() for name, outcome in measured.items()}
    experts = [name for name in shares if name.startswith(PRETRAINED)]
    headline = {
        name: {kind: share.accuracy for kind, share in shares[name].items()} for name in shares if not is_expert(name)
    }
    best = max(experts, key=lambda name: (shares[name][WORST].accuracy, shares[name][CLEAN].accuracy))
    return {
        "schema_version": SCHEMA,
        "epsilon": epsilon,
        "images": shares[MIXTURE][CLEAN].total,
        **headline,
        "best-expert": {"name": best.removeprefix(PRETRAINED)}
        | {kind: share.accuracy for kind, share in shares[best].items()},
        "grid": {
            name: {format_epsilon(radius): share.accuracy for radius, share in curve.items()}
            for name, curve in curves.items()
        },
    }


def show() -> None:
    """Print the results of the last evaluation and where they lie. Raises UserError when there are none."""
    head = files.read_json(paths.SUMMARY)
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA:
        raise UserError(f"{paths.SUMMARY}: not a result of this version of advmoe; run `dvc repro evaluate`")
    reports = [_report(path) for path in sorted(paths.EVALUATION.glob("*.json"))]
    if not reports:
        raise UserError(f"{paths.EVALUATION}: holds no results; run `dvc repro evaluate`")
    order = {name: place for place, name in enumerate(head)}
    reports.sort(key=lambda report: (order.get(report["model"], len(order)), report["model"]))
    kinds = list(reports[0]["accuracy"])
    rows = [
        [MEANING.get(report["model"], report["model"]), *(str(Share(**report["accuracy"][kind])) for kind in kinds)]
        for report in reports
    ]
    title = (
        f"accuracy in % [95 % Wilson interval] on {head['images']} test images, "
        f"L-inf epsilon {head['epsilon']:g} = {format_epsilon(head['epsilon'])}"
    )
    console.table(title, ["model", *kinds], rows)
    _show_alarms()
    console.say(f"numbers: {paths.SUMMARY}, {paths.EVALUATION}/   plots: `dvc plots show`   models: {paths.ARTIFACTS}/")
    console.say("next: `advmoe evaluate --attack pgd --epsilon 8/255`, `dvc exp run -S epsilon=0.15`, `advmoe --help`")


def _report(path: Path) -> dict[str, Any]:
    report = files.read_json(path)
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA or "accuracy" not in report:
        raise UserError(f"{path}: not a result of this version of advmoe; run `dvc repro evaluate`")
    return report


def _show_alarms() -> None:
    """Training raised them; whoever reads the results should see them too."""
    for path in sorted(paths.METRICS.glob("*/*.json")):
        report = files.read_json(path)
        for alarm in report.get("alarms", []) if isinstance(report, dict) else []:
            console.warn(alarm)

"""Ad-hoc evaluation of one model: evaluates, runs the checks, prints the results and writes them to `runs/`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.attacks.ball import Norm
from advmoe.attacks.registry import AttackSettings
from advmoe.core import artifacts, console, files, paths
from advmoe.core.artifacts import hash_tensors
from advmoe.core.settings import format_epsilon
from advmoe.evaluation import serialise, verdict
from advmoe.evaluation.checks.base import CheckContext
from advmoe.evaluation.external_models import LoadedModel, load_model
from advmoe.evaluation.harness import EvaluationResult, EvaluationTarget, clear_resume_state, evaluate
from advmoe.evaluation.request import EvaluationRequest, ResolvedRequest, resolve
from advmoe.evaluation.verdict import Verdict
from advmoe.runtime import machine
from advmoe.statistics.decisions import CLEAN

NORM_TITLES: dict[Norm, str] = {"linf": "L-inf", "l2": "L2"}


def run_request(request: EvaluationRequest) -> Path:
    """Evaluates a model, prints the results, returns the path of the JSON file. Raises UserError as `resolve` does."""
    loaded = load_model(request.model, request.weights, request.expert)
    resolved = resolve(request, loaded)
    device = machine.device()
    target = EvaluationTarget(
        name=loaded.name,
        model=loaded.model.to(device),
        images=resolved.images.pixels().to(device),
        labels=resolved.images.labels.to(device),
        sources={name: model.to(device) for name, model in resolved.sources.items()},
        identity=loaded.identity,
    )
    result = evaluate(target, resolved.attacks, resolved.config)
    context = CheckContext(
        target, resolved.attacks, result, resolved.config, resolved.check_settings, resolved.training_hashes
    )
    check_verdict = verdict.run_checks(context) if request.checks else None
    _print_report(request, resolved, result, check_verdict)
    path = _write_report(request, loaded, resolved, result, check_verdict)
    clear_resume_state(target, resolved.attacks, resolved.config)
    return path


def _print_report(
    request: EvaluationRequest, resolved: ResolvedRequest, result: EvaluationResult, check_verdict: Verdict | None
) -> None:
    radius = f"{NORM_TITLES[request.norm]} epsilon {format_epsilon(resolved.config.ball.epsilon)}"
    withheld = check_verdict is not None and check_verdict.status == "fail"
    # with dropping, a row holds the accuracy after this attack and all above it
    prefix = "+ " if resolved.config.drop_fallen else ""
    rows = [
        [
            f"{prefix}{name}" if name in result.outcomes else name,
            "withheld" if withheld and name != CLEAN else str(share),
            f"{share.correct}/{share.total}" if not withheld or name == CLEAN else "",
            *_cost_cells(result, name),
        ]
        for name, share in result.accuracies().items()
    ]
    title = f"{_display_name(request)}: accuracy on {len(resolved.images)} images, {radius}"
    console.table(title, ["", "% [95 % Wilson interval]", "images", "forward", "backward", "seconds"], rows)
    if resolved.config.drop_fallen:
        console.info("+ accuracy after this attack and all above it: misclassified images are not attacked again")
    for name, attack in resolved.attacks.items():
        console.info(f"{name}: {_attack_settings(attack)}")
    if check_verdict is None:
        console.warn("no checks were run, so these numbers are not validated")
        return
    verdict.show(_display_name(request), check_verdict)
    if withheld:
        console.warn(f"headline withheld: {check_verdict.reasons[0]}")


def _display_name(request: EvaluationRequest) -> str:
    return request.model if request.expert is None else f"{request.model}, expert {request.expert}"


def _attack_settings(attack: AttackSettings) -> str:
    """Formats the settings of an attack: 'steps 50, step_size 0.25'."""
    settings = attack.model_dump(mode="json", exclude={"kind"})
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "no settings"


def _cost_cells(result: EvaluationResult, name: str) -> list[str]:
    if name not in result.outcomes:
        return ["", "", ""]
    outcome = result.outcomes[name]
    return [str(outcome.forward), str(outcome.backward), f"{outcome.seconds:.1f}"]


def _write_report(
    request: EvaluationRequest,
    loaded: LoadedModel,
    resolved: ResolvedRequest,
    result: EvaluationResult,
    check_verdict: Verdict | None,
) -> Path:
    report: dict[str, Any] = {
        "model": request.model,
        "expert": request.expert,
        "identity": loaded.identity,
        "data": str(request.data or paths.DATASET),
        "norm": request.norm,
        "epsilon": resolved.config.ball.epsilon,
        **serialise.model_metrics(result, resolved.attacks, resolved.config, resolved.class_names, check_verdict),
        "seconds": serialise.timings(loaded.name, result),
    }
    path = paths.RUNS / f"evaluate-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.json"
    _write_examples(path.with_suffix(".safetensors"), loaded, resolved, result)
    if check_verdict is not None:
        files.write_json(path.with_suffix(".verdict.json"), {loaded.name: check_verdict.as_dict()})
    files.write_json(path, report)
    console.info(f"written to {path}; verdict and adversarial images are in the same folder")
    return path


def _write_examples(path: Path, loaded: LoadedModel, resolved: ResolvedRequest, result: EvaluationResult) -> None:
    images = resolved.images
    tensors = {"images": images.images, "labels": images.labels, "index": images.index}
    artifacts.save(
        path,
        "adversarial-examples",
        tensors | serialise.decision_tensors(loaded.name, result, with_images=True),
        about={"epsilon": resolved.config.ball.epsilon, "model": loaded.name},
        params=_dump_attacks(resolved.attacks),
        inputs={"model": loaded.identity, "images": hash_tensors({"images": images.images})},
        seed=resolved.config.seed,
        metrics={},
        seconds=sum(outcome.seconds for outcome in result.outcomes.values()),
    )


def _dump_attacks(attacks: Mapping[str, AttackSettings]) -> dict[str, Any]:
    return {name: attack.model_dump(mode="json") for name, attack in attacks.items()}

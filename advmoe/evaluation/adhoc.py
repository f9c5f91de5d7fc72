"""Answering a quick question: evaluate, judge, print, and write all of it to `runs/`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.attacks.ball import Norm
from advmoe.attacks.registry import AnyAttack
from advmoe.core import artifacts, console, files, paths
from advmoe.core.artifacts import hash_tensors
from advmoe.core.settings import format_epsilon
from advmoe.evaluation import serialise, verdict
from advmoe.evaluation.checks.base import CheckContext
from advmoe.evaluation.external_models import LoadedModel, load_model
from advmoe.evaluation.harness import EvaluationResult, EvaluationTarget, clear_resume_state, evaluate
from advmoe.evaluation.request import EvaluationRequest, ResolvedRequest, resolve
from advmoe.evaluation.verdict import Verdict
from advmoe.runtime.machine import device
from advmoe.statistics.decisions import CLEAN

TITLES: dict[Norm, str] = {"linf": "L-inf", "l2": "L2"}


def run_request(question: EvaluationRequest) -> Path:
    """Evaluate, print table and verdict; returns the JSON written. Raises UserError for what cannot be."""
    subject = load_model(question.model, question.weights, question.expert)
    setting = resolve(question, subject)
    place = device()
    target = EvaluationTarget(
        name=subject.name,
        model=subject.model.to(place),
        images=setting.images.pixels().to(place),
        labels=setting.images.labels.to(place),
        sources={name: model.to(place) for name, model in setting.sources.items()},
        identity=subject.identity,
    )
    measured = evaluate(target, setting.attacks, setting.terms)
    case = CheckContext(target, setting.attacks, measured, setting.terms, setting.probes, setting.training)
    judged = verdict.judge(case) if question.checks else None
    _show(question, setting, measured, judged)
    path = _write(question, subject, setting, measured, judged)
    clear_resume_state(target, setting.attacks, setting.terms)
    return path


def _show(
    question: EvaluationRequest, setting: ResolvedRequest, measured: EvaluationResult, judged: Verdict | None
) -> None:
    radius = f"{TITLES[question.norm]} epsilon {format_epsilon(setting.terms.ball.epsilon)}"
    withheld = judged is not None and judged.status == "fail"
    # with dropping a line tells what is left after this attack and those above it
    left = "+ " if setting.terms.drop_fallen else ""
    rows = [
        [
            f"{left}{name}" if name in measured.outcomes else name,
            "withheld" if withheld and name != CLEAN else str(share),
            f"{share.correct}/{share.total}" if not withheld or name == CLEAN else "",
            *_cost(measured, name),
        ]
        for name, share in measured.shares().items()
    ]
    title = f"{_name(question)}: accuracy on {len(setting.images)} images, {radius}"
    console.table(title, ["", "% [95 % Wilson interval]", "images", "forward", "backward", "seconds"], rows)
    if setting.terms.drop_fallen:
        console.say("+ marks what is left after this attack and all above it: images that fell are spared the others")
    for name, attack in setting.attacks.items():
        console.say(f"{name}: {_numbers(attack)}")
    if judged is None:
        console.warn("no checks were asked for: nothing says that these numbers can be believed")
        return
    verdict.show(_name(question), judged)
    if withheld:
        console.warn(f"headline withheld: {judged.reasons[0]}")


def _name(question: EvaluationRequest) -> str:
    return question.model if question.expert is None else f"{question.model}, expert {question.expert}"


def _numbers(attack: AnyAttack) -> str:
    """What an attack was run with, for people: 'steps 50, step_size 0.25'."""
    settings = attack.model_dump(mode="json", exclude={"kind"})
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "has no settings"


def _cost(measured: EvaluationResult, name: str) -> list[str]:
    if name not in measured.outcomes:
        return ["", "", ""]
    outcome = measured.outcomes[name]
    return [str(outcome.forward), str(outcome.backward), f"{outcome.seconds:.1f}"]


def _write(
    question: EvaluationRequest,
    subject: LoadedModel,
    setting: ResolvedRequest,
    measured: EvaluationResult,
    judged: Verdict | None,
) -> Path:
    report: dict[str, Any] = {
        "model": question.model,
        "expert": question.expert,
        "identity": subject.identity,
        "data": str(question.data or paths.DATASET),
        "norm": question.norm,
        "epsilon": setting.terms.ball.epsilon,
        **serialise.numbers(measured, setting.attacks, setting.terms, setting.class_names, judged),
        "seconds": serialise.timings(subject.name, measured),
    }
    path = paths.RUNS / f"evaluate-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.json"
    _write_examples(path.with_suffix(".safetensors"), subject, setting, measured)
    if judged is not None:
        files.write_json(path.with_suffix(".verdict.json"), {subject.name: judged.as_dict()})
    files.write_json(path, report)
    console.say(f"written to {path}, with verdict and adversarial images beside it")
    return path


def _write_examples(path: Path, subject: LoadedModel, setting: ResolvedRequest, measured: EvaluationResult) -> None:
    images = setting.images
    tensors = {"images": images.images, "labels": images.labels, "index": images.index}
    artifacts.save(
        path,
        "adversarial-examples",
        tensors | serialise.decisions(subject.name, measured, with_images=True),
        about={"epsilon": setting.terms.ball.epsilon, "model": subject.name},
        params=_dumped(setting.attacks),
        inputs={"model": subject.identity, "images": hash_tensors({"images": images.images})},
        seed=setting.terms.seed,
        metrics={},
        seconds=sum(outcome.seconds for outcome in measured.outcomes.values()),
    )


def _dumped(attacks: Mapping[str, AnyAttack]) -> dict[str, Any]:
    return {name: attack.model_dump(mode="json") for name, attack in attacks.items()}

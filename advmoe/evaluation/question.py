"""The quick question: one model, a few attacks, any epsilon; the answer goes to `runs/`, never over tracked results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from advmoe import classifiers, console, files, paths
from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.catalogue import NAMES, Attack
from advmoe.classifiers import Classifier
from advmoe.data import dataset
from advmoe.data.dataset import Facts
from advmoe.errors import UserError
from advmoe.evaluation.suite import Evaluate, measure
from advmoe.machine import derive_seed
from advmoe.params import Epsilon, Seed, format_epsilon, load_section, validate

Norm = Literal["linf", "l2"]
NORMS: dict[Norm, Callable[[float], Ball]] = {"linf": LInf, "l2": L2}
TITLES: dict[Norm, str] = {"linf": "L-inf", "l2": "L2"}


@dataclass(frozen=True)
class Question:
    """What was asked for; None means: as params.yaml says."""

    attacks: Sequence[str]
    epsilon: str | None
    steps: int | None
    limit: int | None
    model: Path
    norm: Norm = "linf"


def answer(question: Question) -> Path:
    """Evaluate, print the table, write the numbers; returns the file written. Raises UserError for what cannot be."""
    settings, seed = load_section("evaluate", Evaluate), load_section("seed", Seed)
    epsilon = (
        load_section("epsilon", Epsilon)
        if question.epsilon is None
        else validate(question.epsilon, Epsilon, "--epsilon")
    )
    attacks = _attacks(question, settings)
    data = dataset.load(paths.DATASET)
    classifier = classifiers.load(question.model)
    _check_fit(question.model, classifier, data.facts, data.sha256)
    split = data["test"].first(question.limit if question.limit is not None else settings.limit)
    measured = measure(
        question.model.stem,
        classifier.model,
        split,
        attacks,
        ball=NORMS[question.norm](epsilon),
        batch_size=settings.batch_size,
        precision=settings.precision,
        seed=derive_seed(seed, "evaluate"),
    )
    shares = measured.shares()
    radius = f"{TITLES[question.norm]} epsilon {format_epsilon(epsilon)}"
    title = f"{question.model}: accuracy on {len(split)} test images, {radius}"
    console.table(
        title,
        ["", "% [95 % Wilson interval]", "images"],
        [[name, str(share), f"{share.correct}/{share.total}"] for name, share in shares.items()],
    )
    report: dict[str, Any] = {
        "model": str(question.model),
        "sha256": classifier.header.sha256,
        "norm": question.norm,
        "epsilon": epsilon,
        "attacks": {name: attack.model_dump(mode="json") for name, attack in attacks.items()},
        "accuracy": {name: share.as_dict() for name, share in shares.items()},
    }
    path = paths.RUNS / f"evaluate-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.json"
    files.write_json(path, report)
    console.say(f"written to {path}")
    return path


def _attacks(question: Question, settings: Evaluate) -> dict[str, Attack]:
    """The attacks asked for, with their settings from params.yaml and the steps from the command line."""
    wanted = question.attacks or list(settings.attacks)
    unknown = [name for name in wanted if name not in settings.attacks]
    if unknown:
        raise UserError(
            f"--attack {unknown[0]}: params.yaml has no evaluate.attacks.{unknown[0]}; it has "
            f"{files.names(settings.attacks)}, kinds are {files.names(NAMES)}"
        )
    return {name: _with_steps(name, settings.attacks[name], question) for name in wanted}


def _with_steps(name: str, attack: Attack, question: Question) -> Attack:
    if question.steps is None:
        return attack
    if not hasattr(attack, "steps"):
        if question.attacks:
            raise UserError(f"--steps: {name} takes one step, it has no number of steps")
        return attack
    return attack.model_copy(update={"steps": question.steps})


def _check_fit(path: Path, classifier: Classifier, facts: Facts, sha256: str) -> None:
    own = classifier.about.facts
    shape, own_shape = ((each.channels, each.height, each.width) for each in (facts, own))
    if shape != own_shape or facts.class_names != own.class_names:
        raise UserError(
            f"{path}: made for {own.classes} classes of images {own_shape}, but {paths.DATASET} has "
            f"{facts.classes} classes of {shape}"
        )
    if classifier.header.inputs.get("dataset") != sha256:
        console.warn(f"{path} was trained on another data set: test images may have been among its training images")

"""evaluate: how the mixture, its parts and the plain networks do on the test split, clean and attacked, and whether
these numbers may be believed.

Reads `seed`, `epsilon`, `evaluate`, the data set, the mixture, the pre-trained experts and the baselines. Writes
metrics/evaluate.json (the headline), metrics/verdict.json (the checks), metrics/evaluate/ (one file per model),
plots/evaluate/ and, with the adversarial images, artifacts/evaluate/adversarial.safetensors.

Shapes: N images, E experts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from advmoe import artifacts, classifiers, console, files, paths
from advmoe.attacks.ball import LInf
from advmoe.attacks.catalogue import AnyAttack
from advmoe.classifiers import Classifier, Mixture
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split
from advmoe.errors import UserError
from advmoe.evaluation import gate, plots, record, results, verdict
from advmoe.evaluation.checks.case import Case
from advmoe.evaluation.checks.plumbing import content_hashes
from advmoe.evaluation.harness import WORST, Measured, Target, Terms, fixed_seed, forget, measure
from advmoe.evaluation.minimal import minimal_epsilons
from advmoe.evaluation.paired import compare
from advmoe.evaluation.results import Result
from advmoe.evaluation.suite import Evaluate, fitting, robustness_curve
from advmoe.machine import device
from advmoe.models.moe import MixtureOfExperts
from advmoe.params import Epsilon, Seed, load_section


@dataclass(frozen=True)
class Subject:
    """A model of the pipeline. `full`: it meets every attack and is judged; the others meet the experts' attacks."""

    name: str
    model: nn.Module
    full: bool = False


@dataclass
class Evaluation:
    """One run of this stage."""

    settings: Evaluate
    terms: Terms
    data: Dataset
    split: Split
    sources: dict[str, nn.Module]
    experts: tuple[str, ...]
    training: frozenset[str]
    results: dict[str, Result] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    done: list[tuple[Target, dict[str, AnyAttack]]] = field(default_factory=list)


def run() -> None:
    """Evaluate everything the pipeline trained."""
    started = time.monotonic()
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    settings = load_section("evaluate", Evaluate)
    data = dataset.load(paths.DATASET)
    mixture = classifiers.load(paths.MIXTURE)
    baselines = {name: classifiers.load(paths.artifact("baseline", name)) for name in settings.baselines}
    inputs = {"dataset": data.sha256, results.MIXTURE: _trained_on(mixture, data, results.MIXTURE)}
    inputs |= {results.BASELINE + name: _trained_on(model, data, name) for name, model in baselines.items()}
    evaluation = Evaluation(
        settings=settings,
        terms=settings.terms(LInf(epsilon), fixed_seed(seed)),
        data=data,
        split=data["test"].first(settings.limit),
        sources={results.BASELINE + name: baseline.model.to(device()) for name, baseline in baselines.items()},
        experts=_architecture(mixture).experts,
        training=frozenset(content_hashes(data["train"].images)),
    )
    for subject in _subjects(mixture, baselines):
        _evaluate(subject, evaluation)
    _compare(evaluation, seed)
    _write(evaluation, epsilon)
    _write_examples(evaluation, inputs, seed, epsilon, time.monotonic() - started)
    for target, attacks in evaluation.done:
        forget(target, attacks, evaluation.terms)
    console.say("`advmoe results` shows all results")


def _subjects(mixture: Classifier, baselines: dict[str, Classifier]) -> Iterator[Subject]:
    """Every model to evaluate."""
    architecture, joint = _architecture(mixture), mixture.model
    assert isinstance(joint, MixtureOfExperts)
    yield Subject(results.MIXTURE, joint, full=True)
    yield Subject(results.UNIFORM, classifiers.uniform_average(joint))
    experts = {name: classifiers.load(paths.artifact("pretrain", name)).model for name in architecture.experts}
    before = classifiers.assemble(architecture, mixture.about.facts, list(experts.values()), 0)
    yield Subject(results.BEFORE, before)
    for name, baseline in baselines.items():
        yield Subject(results.BASELINE + name, baseline.model, full=True)
    for name, expert in experts.items():
        yield Subject(results.PRETRAINED + name, expert)
    for name, expert in zip(architecture.experts, joint.experts, strict=True):
        yield Subject(results.JOINT + name, expert)


def _architecture(mixture: Classifier) -> Mixture:
    assert isinstance(mixture.about.architecture, Mixture)
    return mixture.about.architecture


def _trained_on(source: Classifier, data: Dataset, name: str) -> str:
    if source.header.inputs.get("dataset") != data.sha256:
        raise UserError(f"{name}: trained on other data than {paths.DATASET}; run `dvc repro`")
    return source.header.sha256


def _evaluate(subject: Subject, evaluation: Evaluation) -> None:
    place, settings = device(), evaluation.settings
    target = Target(
        name=subject.name,
        model=subject.model.to(place),
        images=evaluation.split.pixels().to(place),
        labels=evaluation.split.labels.to(place),
        sources={name: model for name, model in evaluation.sources.items() if name != subject.name},
    )
    wanted = settings.full() if subject.full else {name: settings.attacks[name] for name in settings.experts}
    attacks = fitting(wanted, target.has_gate, target.sources)
    measured = measure(target, attacks, evaluation.terms)
    evaluation.done.append((target, attacks))
    result = _judged(target, attacks, measured, evaluation) if subject.full else Result(target, measured)
    result.numbers = record.numbers(
        measured, attacks, evaluation.terms, evaluation.data.facts.class_names, result.verdict
    )
    evaluation.results[subject.name] = result
    # the images of eighteen experts would fill the disk, and nobody asks for them
    evaluation.tensors |= record.decisions(subject.name, measured, with_images=subject.full)
    evaluation.timings |= record.timings(subject.name, measured)
    console.say(f"{subject.name}: " + ", ".join(f"{kind} {share}" for kind, share in measured.shares().items()))


def _judged(target: Target, attacks: dict[str, AnyAttack], measured: Measured, evaluation: Evaluation) -> Result:
    settings, terms = evaluation.settings, evaluation.terms
    return Result(
        target,
        measured,
        verdict.judge(Case(target, attacks, measured, terms, settings.checks, evaluation.training)),
        dict(robustness_curve(target, settings.grid, terms)),
        minimal_epsilons(target, settings.minimal, measured, terms),
    )


def _compare(evaluation: Evaluation, seed: int) -> None:
    """The mixture against every other model, on the same images.

    Judged models are compared in the worst case of all that each met: to leave gate-aware attacks out against a plain
    network would flatter the mixture. The others are compared over the attacks that both met.
    """
    mixture = evaluation.results[results.MIXTURE]
    for name, other in evaluation.results.items():
        if other is mixture:
            continue
        met = [attack for attack in other.measured.outcomes if attack in mixture.measured.outcomes]
        left = mixture.measured.correct[WORST] if other.verdict else mixture.measured.over(met)
        mixture.against[name] = compare(left, other.measured.correct[WORST], seed).as_dict()


def _write(evaluation: Evaluation, epsilon: float) -> None:
    mixture = evaluation.results[results.MIXTURE]
    weights = gate.weights(mixture.target, mixture.measured, evaluation.experts)
    mixture.extra = {"gate": weights, "oracle_routing": gate.oracle_routing(mixture.target, mixture.measured)}
    for name, result in evaluation.results.items():
        files.write_json(results.report_path(name), results.report(name, result, epsilon))
    files.write_json(paths.SUMMARY, results.summary(evaluation.results, epsilon))
    judged = {name: result.verdict for name, result in evaluation.results.items()}
    files.write_json(paths.VERDICT, {name: judgement.as_dict() for name, judgement in judged.items() if judgement})
    plots.write(evaluation.results, weights, evaluation.data.facts.class_names)


def _write_examples(evaluation: Evaluation, inputs: dict[str, str], seed: int, epsilon: float, seconds: float) -> None:
    split = evaluation.split
    tensors = {"images": split.images, "labels": split.labels, "index": split.index, **evaluation.tensors}
    about: dict[str, Any] = {"epsilon": epsilon, "norm": "linf"}
    artifacts.save(
        paths.ADVERSARIAL,
        "adversarial-examples",
        tensors,
        about=about,
        params=evaluation.settings.model_dump(mode="json"),
        inputs=inputs,
        seed=seed,
        metrics={},
        seconds=seconds,
        timings=evaluation.timings,
    )
    console.say(f"adversarial images written to {paths.ADVERSARIAL}")

"""evaluate: how the mixture, its parts and the plain networks do on the test split, clean and attacked.

Reads `seed`, `epsilon`, `evaluate`, the data set, the mixture, the pre-trained experts and the baselines. Writes
metrics/evaluate.json (the headline), metrics/evaluate/ (one file per model), plots/evaluate/ and, with the adversarial
examples, artifacts/evaluate/adversarial.safetensors.

Shapes: N images, E experts.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from advmoe import artifacts, classifiers, console, files, paths
from advmoe.attacks.ball import LInf
from advmoe.classifiers import Classifier, Mixture
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split
from advmoe.errors import UserError
from advmoe.evaluation import results
from advmoe.evaluation.intervals import Share
from advmoe.evaluation.suite import Evaluate, Measured, measure, robustness_curve
from advmoe.machine import derive_seed
from advmoe.models.moe import MixtureOfExperts
from advmoe.params import Epsilon, Seed, format_epsilon, load_section
from advmoe.training.joint import entropy, gate_weights, shift

Curve = dict[float, Share]


def run() -> None:
    """Evaluate everything the pipeline trained."""
    started = time.monotonic()
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    settings = load_section("evaluate", Evaluate)
    data = dataset.load(paths.DATASET)
    split = data["test"].first(settings.limit)
    mixture = classifiers.load(paths.MIXTURE)
    assert isinstance(mixture.model, MixtureOfExperts)
    stream = derive_seed(seed, "evaluate")
    measured: dict[str, Measured] = {}
    curves: dict[str, Curve] = {}
    inputs = {"dataset": data.sha256}
    for name, model, source in _subjects(mixture, settings.baselines):
        if source is not None:
            inputs[name] = _trained_on(source, data, name)
        outcome = measure(
            name,
            model,
            split,
            settings.attacks,
            ball=LInf(epsilon),
            batch_size=settings.batch_size,
            precision=settings.precision,
            seed=stream,
        )
        # the images of eighteen experts would fill the memory, and nobody asks for them
        measured[name] = replace(outcome, images={}) if results.is_expert(name) else outcome
        if source is not None and not results.is_expert(name):
            curve = robustness_curve(
                name,
                model,
                split,
                settings.grid,
                batch_size=settings.batch_size,
                precision=settings.precision,
                seed=stream,
            )
            curves[name] = dict(curve)
        console.say(f"{name}: " + ", ".join(f"{kind} {share}" for kind, share in measured[name].shares().items()))
    gate = _gate(mixture.model, split, measured["mixture"], _expert_names(mixture))
    _write(measured, curves, gate, epsilon, split, data)
    _write_examples(measured, split, settings, inputs, seed, epsilon, time.monotonic() - started)
    console.say("`advmoe results` shows all results")


def _subjects(mixture: Classifier, baselines: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, Classifier | None]]:
    """Every model to evaluate: its name, itself, and the artifact it came from (None where it is derived)."""
    architecture, joint = mixture.about.architecture, mixture.model
    assert isinstance(architecture, Mixture)
    assert isinstance(joint, MixtureOfExperts)
    yield results.MIXTURE, joint, mixture
    yield results.UNIFORM, classifiers.uniform_average(joint), None
    experts = {name: classifiers.load(paths.artifact("pretrain", name)) for name in architecture.experts}
    models = [expert.model for expert in experts.values()]
    yield results.BEFORE, classifiers.assemble(architecture, mixture.about.facts, models, 0), None
    for name in baselines:
        baseline = classifiers.load(paths.artifact("baseline", name))
        yield results.BASELINE + name, baseline.model, baseline
    for name, expert in experts.items():
        yield results.PRETRAINED + name, expert.model, expert
    for name, model in zip(architecture.experts, joint.experts, strict=True):
        yield results.JOINT + name, model, None


def _expert_names(mixture: Classifier) -> tuple[str, ...]:
    architecture = mixture.about.architecture
    assert isinstance(architecture, Mixture)
    return architecture.experts


def _trained_on(source: Classifier, data: Dataset, name: str) -> str:
    if source.header.inputs.get("dataset") != data.sha256:
        raise UserError(f"{name}: trained on other data than {paths.DATASET}; run `dvc repro`")
    return source.header.sha256


def _gate(model: MixtureOfExperts, split: Split, measured: Measured, experts: tuple[str, ...]) -> dict[str, Any]:
    """Gate weights on clean images and under each attack: mean per expert, entropy, shift away from clean."""
    place = next(model.parameters()).device
    clean_NE = gate_weights(model, split.pixels().to(place))
    report: dict[str, Any] = {"clean": _weights(clean_NE, clean_NE, experts)}
    for name, images in measured.images.items():
        report[name] = _weights(gate_weights(model, images.to(place)), clean_NE, experts)
    return report


def _weights(weights_NE: Tensor, clean_NE: Tensor, experts: tuple[str, ...]) -> dict[str, Any]:
    means = weights_NE.mean(dim=0).tolist()
    return {
        "mean_weight": {name: round(mean, 6) for name, mean in zip(experts, means, strict=True)},
        "entropy": round(float(entropy(weights_NE)), 6),
        "shift": round(float(shift(weights_NE, clean_NE)), 6),
    }


def _write(
    measured: dict[str, Measured],
    curves: dict[str, Curve],
    gate: dict[str, Any],
    epsilon: float,
    split: Split,
    data: Dataset,
) -> None:
    for name, outcome in measured.items():
        report: dict[str, Any] = {"schema_version": results.SCHEMA, "model": name, "epsilon": epsilon}
        report["accuracy"] = {key: share.as_dict() for key, share in outcome.shares().items()}
        if name in curves:
            report["grid"] = {format_epsilon(radius): share.as_dict() for radius, share in curves[name].items()}
        if name == results.MIXTURE:
            report["gate"] = gate
        files.write_json(paths.EVALUATION / f"{name.replace('/', '-')}.json", report)
    files.write_json(paths.SUMMARY, results.summary(measured, curves, epsilon))
    _write_plots(measured[results.MIXTURE], curves, gate, split, data)


def _write_plots(
    mixture: Measured, curves: dict[str, Curve], gate: dict[str, Any], split: Split, data: Dataset
) -> None:
    radii = next(iter(curves.values()))
    rows = [{"epsilon": radius, **{name: curve[radius].accuracy for name, curve in curves.items()}} for radius in radii]
    files.write_csv(paths.plots("evaluate", "robustness"), rows)
    kinds = list(gate)
    experts = gate["clean"]["mean_weight"]
    weights = [{"expert": name, **{kind: gate[kind]["mean_weight"][name] for kind in kinds}} for name in experts]
    files.write_csv(paths.plots("evaluate", "gate"), weights)
    names = data.facts.class_names
    for kind, predicted in mixture.predicted.items():
        pairs = zip(split.labels.tolist(), predicted.tolist(), strict=True)
        table = [{"actual": names[actual], "predicted": names[guess]} for actual, guess in pairs]
        files.write_csv(paths.plots("evaluate", f"confusion-{kind}"), table)


def _write_examples(
    measured: dict[str, Measured],
    split: Split,
    settings: Evaluate,
    inputs: dict[str, str],
    seed: int,
    epsilon: float,
    seconds: float,
) -> None:
    tensors = {"images": split.images, "labels": split.labels, "index": split.index}
    for name, outcome in measured.items():
        for kind, correct in outcome.correct.items():
            tensors[f"{name}.{kind}.correct"] = correct
        for kind, images in outcome.images.items():
            tensors[f"{name}.{kind}.images"] = images
    artifacts.save(
        paths.ADVERSARIAL,
        "adversarial-examples",
        tensors,
        about={"epsilon": epsilon, "norm": "linf"},
        params=settings.model_dump(mode="json"),
        inputs=inputs,
        seed=seed,
        metrics={},
        seconds=seconds,
    )
    console.say(f"adversarial examples written to {paths.ADVERSARIAL}")

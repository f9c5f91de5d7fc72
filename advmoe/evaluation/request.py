"""The quick question: one model, some attacks, any epsilon. Here what it leaves open is decided; `answer.py` answers.

The model is an artifact of this project, one of its experts, or anybody's PyTorch classifier.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from torch import nn

from advmoe.attacks import presets
from advmoe.attacks.ball import L2, Ball, LInf, Norm
from advmoe.attacks.custom import Custom
from advmoe.attacks.gate_aware import Transfer
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import AnyAttack
from advmoe.core import console, files, paths, user_code
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, Seed, load_section, validate
from advmoe.data import dataset
from advmoe.data.dataset import Facts, Split
from advmoe.evaluation import external_models
from advmoe.evaluation.checks.base import Probes
from advmoe.evaluation.checks.consistency import content_hashes
from advmoe.evaluation.config import EvaluateSection, fitting
from advmoe.evaluation.external_models import LoadedModel
from advmoe.evaluation.harness import EvaluationConfig
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import evaluation_seed

PRESETS: tuple[Preset, ...] = get_args(Preset)
NORMS: dict[Norm, Callable[[float], Ball]] = {"linf": LInf, "l2": L2}
# for strangers, who have no params.yaml: what the checks of the default pipeline spend
PROBES = Probes(images=50, steps=20, samples=200)


@dataclass(frozen=True)
class EvaluationRequest:
    """What was asked for; None means: as params.yaml says, or the standard where there is none."""

    model: str
    attacks: Sequence[str] = ()
    epsilon: str | None = None
    norm: Norm = "linf"
    steps: int | None = None
    limit: int | None = None
    weights: Path | None = None
    expert: str | None = None
    data: Path | None = None
    training_data: Path | None = None
    batch_size: int | None = None
    checks: bool = True


@dataclass(frozen=True)
class ResolvedRequest:
    """All that a question leaves open, decided."""

    images: Split
    class_names: Sequence[str]
    training: frozenset[str] | None
    attacks: dict[str, AnyAttack]
    terms: EvaluationConfig
    probes: Probes
    sources: Mapping[str, nn.Module]


def resolve(question: EvaluationRequest, subject: LoadedModel) -> ResolvedRequest:
    """Decide what is open. Raises UserError for what is missing or does not fit the subject."""
    setting = (
        _project_model(question, subject, subject.artifact) if subject.artifact else _external_model(question, subject)
    )
    if not len(setting.images):
        raise UserError(f"{question.data}: holds no images")
    return setting


def _project_model(question: EvaluationRequest, subject: LoadedModel, artifact: Classifier) -> ResolvedRequest:
    """An artifact of this project: the numbers of params.yaml, and by default the prepared test split."""
    settings, seed = load_section("evaluate", EvaluateSection), load_section("seed", Seed)
    facts, training = artifact.about.facts, None
    limit = question.limit if question.limit is not None else settings.limit
    if question.data is None:
        data = dataset.load(paths.DATASET)
        _check_fit(question.model, artifact, data.facts, data.sha256)
        images, training = data["test"].first(limit), frozenset(content_hashes(data["train"].images))
    else:
        images = external_models.load_images(question.data, limit)
        external_models.check_forward(subject, images)
    epsilon = load_section("epsilon", Epsilon) if question.epsilon is None else _epsilon(question.epsilon)
    terms = settings.terms(NORMS[question.norm](epsilon), evaluation_seed(seed))
    sources = _sources(settings.baselines, artifact)
    known = {**presets.STANDARD, **settings.attacks}
    has_gate = isinstance(subject.model, MixtureOfExperts)
    return ResolvedRequest(
        images=images,
        class_names=facts.class_names,
        training=_training(question, training),
        attacks=_wanted(question, known, tuple(sources), has_gate) or fitting(settings.full(), has_gate, sources),
        terms=_with_batch(terms, question),
        probes=settings.checks,
        sources=sources,
    )


def _external_model(question: EvaluationRequest, subject: LoadedModel) -> ResolvedRequest:
    """A stranger: everything comes from the command line or is standard; params.yaml has no say."""
    for option, value, example in (("--data", question.data, "images.npz"), ("--epsilon", question.epsilon, "8/255")):
        if value is None:
            raise UserError(
                f"{option} is missing: {question.model} is not of this project; give for example {option} {example}"
            )
    assert question.data is not None
    assert question.epsilon is not None
    images = external_models.load_images(question.data, question.limit)
    classes = external_models.check_forward(subject, images)
    precision: Precision = "float32"  # nobody knows how a stranger takes autocast
    ball = NORMS[question.norm](_epsilon(question.epsilon))
    terms = EvaluationConfig(ball=ball, seed=evaluation_seed(0), precision=precision, batch_size=None, drop_fallen=True)
    return ResolvedRequest(
        images=images,
        class_names=[str(label) for label in range(classes)],
        training=_training(question, None),
        attacks=_wanted(question, presets.STANDARD, (), False) or presets.preset("autoattack", (), False),
        terms=_with_batch(terms, question),
        probes=PROBES,
        sources={},
    )


def _epsilon(text: str) -> float:
    return validate(text, Epsilon, "--epsilon")


def _with_batch(terms: EvaluationConfig, question: EvaluationRequest) -> EvaluationConfig:
    return terms if question.batch_size is None else replace(terms, batch_size=question.batch_size)


def _training(question: EvaluationRequest, known: frozenset[str] | None) -> frozenset[str] | None:
    if question.training_data is None:
        return known
    return frozenset(content_hashes(external_models.load_images(question.training_data, None).images))


def _sources(names: Sequence[str], target: Classifier) -> dict[str, nn.Module]:
    """The baselines that have been built, to transfer from: other networks for images of the same kind."""
    found: dict[str, nn.Module] = {}
    for name in names:
        path = paths.artifact("baseline", name)
        if path.exists():
            other = classifiers.load(path)
            if other.header.sha256 != target.header.sha256 and other.about.facts == target.about.facts:
                found[f"baseline/{name}"] = other.model
    return found


def _wanted(
    question: EvaluationRequest, known: Mapping[str, AnyAttack], sources: tuple[str, ...], has_gate: bool
) -> dict[str, AnyAttack]:
    """The attacks asked for by name, preset or file, with the steps from the command line."""
    wanted: dict[str, AnyAttack] = {}
    for name in question.attacks:
        if name in PRESETS:
            wanted |= presets.preset(name, sources, has_gate)
    for name in question.attacks:
        if name in wanted or name in PRESETS:
            continue  # a preset is what its name promises, whatever is asked for beside it
        if name == "transfer":
            wanted[name] = _transfer(known, sources)
        elif name in known:
            wanted[name] = known[name]
        elif user_code.names_code(name):
            user_code.load_function(name)  # a mistake in the file should be known before an hour is spent
            wanted[Path(name).name] = Custom(kind="own", function=name)
        else:
            raise UserError(
                f"--attack {name}: not known; attacks are {files.names(known)}, presets are {files.names(PRESETS)}, "
                "and path/to/file.py:function is your own"
            )
    return _with_steps(wanted, question.steps)


def _transfer(known: Mapping[str, AnyAttack], sources: tuple[str, ...]) -> Transfer:
    """From all networks there are but the one that is attacked."""
    if not sources:
        raise UserError("--attack transfer: there is no other network of this project to craft on")
    settings = known.get("transfer")
    if isinstance(settings, Transfer):
        return settings.model_copy(update={"sources": sources})
    return Transfer(kind="transfer", **presets.CLIMB, sources=sources)


def _with_steps(attacks: dict[str, AnyAttack], steps: int | None) -> dict[str, AnyAttack]:
    stepping = [name for name, attack in attacks.items() if hasattr(attack, "steps")]
    if steps is None:
        return attacks
    if attacks and not stepping:
        raise UserError(f"--steps: {files.names(attacks)} takes no number of steps")
    return attacks | {name: attacks[name].model_copy(update={"steps": steps}) for name in stepping}


def _check_fit(path: str, classifier: Classifier, facts: Facts, sha256: str) -> None:
    own = classifier.about.facts
    shape, own_shape = ((each.channels, each.height, each.width) for each in (facts, own))
    if shape != own_shape or facts.class_names != own.class_names:
        raise UserError(
            f"{path}: made for {own.classes} classes of images {own_shape}, but {paths.DATASET} has "
            f"{facts.classes} classes of {shape}"
        )
    if classifier.header.inputs.get("dataset") != sha256:
        console.warn(f"{path} was trained on another data set: test images may have been among its training images")

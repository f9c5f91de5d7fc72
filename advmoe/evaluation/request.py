"""Requests for ad-hoc evaluations: one model, some attacks, any epsilon. `adhoc.py` runs them.

The model is an artifact of this project, one of its experts, or any PyTorch classifier.
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
from advmoe.attacks.registry import AttackSettings
from advmoe.core import console, files, paths, user_code
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, Seed, load_section, validate
from advmoe.data import dataset
from advmoe.data.dataset import DatasetInfo, Split
from advmoe.evaluation import external_models
from advmoe.evaluation.checks.base import CheckSettings
from advmoe.evaluation.checks.consistency import content_hashes
from advmoe.evaluation.config import EvaluateSection, applicable_attacks
from advmoe.evaluation.external_models import LoadedModel
from advmoe.evaluation.harness import EvaluationConfig
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import evaluation_seed

PRESETS: tuple[Preset, ...] = get_args(Preset)
BALL_TYPES: dict[Norm, Callable[[float], Ball]] = {"linf": LInf, "l2": L2}
# for external models, which have no params.yaml: the values of the default pipeline
DEFAULT_CHECK_SETTINGS = CheckSettings(images=50, steps=20, samples=200)


@dataclass(frozen=True)
class EvaluationRequest:
    """Options of `advmoe evaluate`; None means the value of params.yaml, or the standard value for external models."""

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
    """A request with every default filled in."""

    images: Split
    class_names: Sequence[str]
    training_hashes: frozenset[str] | None
    attacks: dict[str, AttackSettings]
    config: EvaluationConfig
    check_settings: CheckSettings
    sources: Mapping[str, nn.Module]


def resolve(request: EvaluationRequest, loaded: LoadedModel) -> ResolvedRequest:
    """Fills in the defaults. Raises UserError for missing options and for options that do not fit the model."""
    resolved = (
        _resolve_project_model(request, loaded, loaded.artifact)
        if loaded.artifact
        else _resolve_external_model(request, loaded)
    )
    if not len(resolved.images):
        raise UserError(f"{request.data}: contains no images")
    return resolved


def _resolve_project_model(request: EvaluationRequest, loaded: LoadedModel, artifact: Classifier) -> ResolvedRequest:
    """Resolves a request for an artifact of this project: defaults from params.yaml and the prepared test split."""
    settings, seed = load_section("evaluate", EvaluateSection), load_section("seed", Seed)
    facts, training = artifact.about.facts, None
    limit = request.limit if request.limit is not None else settings.limit
    if request.data is None:
        data = dataset.load(paths.DATASET)
        _check_dataset(request.model, artifact, data.facts, data.sha256)
        images, training = data["test"].first(limit), frozenset(content_hashes(data["train"].images))
    else:
        images = external_models.load_images(request.data, limit)
        external_models.check_forward(loaded, images)
    epsilon = load_section("epsilon", Epsilon) if request.epsilon is None else _parse_epsilon(request.epsilon)
    config = settings.evaluation_config(BALL_TYPES[request.norm](epsilon), evaluation_seed(seed))
    sources = _transfer_sources(settings.baselines, artifact)
    known = {**presets.STANDARD_ATTACKS, **settings.attacks}
    has_gate = isinstance(loaded.model, MixtureOfExperts)
    return ResolvedRequest(
        images=images,
        class_names=facts.class_names,
        training_hashes=_training_hashes(request, training),
        attacks=_requested_attacks(request, known, tuple(sources), has_gate)
        or applicable_attacks(settings.all_attacks(), has_gate, sources),
        config=_with_batch_size(config, request),
        check_settings=settings.checks,
        sources=sources,
    )


def _resolve_external_model(request: EvaluationRequest, loaded: LoadedModel) -> ResolvedRequest:
    """Resolves a request for an external model: options or standard values; params.yaml is not read."""
    for option, value, example in (("--data", request.data, "images.npz"), ("--epsilon", request.epsilon, "8/255")):
        if value is None:
            raise UserError(
                f"{option} is missing: {request.model} is not a model of this project; for example {option} {example}"
            )
    assert request.data is not None
    assert request.epsilon is not None
    images = external_models.load_images(request.data, request.limit)
    classes = external_models.check_forward(loaded, images)
    precision: Precision = "float32"  # an external model may not support autocast
    ball = BALL_TYPES[request.norm](_parse_epsilon(request.epsilon))
    config = EvaluationConfig(
        ball=ball, seed=evaluation_seed(0), precision=precision, batch_size=None, drop_fallen=True
    )
    return ResolvedRequest(
        images=images,
        class_names=[str(label) for label in range(classes)],
        training_hashes=_training_hashes(request, None),
        attacks=_requested_attacks(request, presets.STANDARD_ATTACKS, (), False)
        or presets.preset("autoattack", (), False),
        config=_with_batch_size(config, request),
        check_settings=DEFAULT_CHECK_SETTINGS,
        sources={},
    )


def _parse_epsilon(text: str) -> float:
    return validate(text, Epsilon, "--epsilon")


def _with_batch_size(config: EvaluationConfig, request: EvaluationRequest) -> EvaluationConfig:
    return config if request.batch_size is None else replace(config, batch_size=request.batch_size)


def _training_hashes(request: EvaluationRequest, known: frozenset[str] | None) -> frozenset[str] | None:
    if request.training_data is None:
        return known
    return frozenset(content_hashes(external_models.load_images(request.training_data, None).images))


def _transfer_sources(names: Sequence[str], target: Classifier) -> dict[str, nn.Module]:
    """Returns the trained baselines for the same data set, to transfer attacks from."""
    sources: dict[str, nn.Module] = {}
    for name in names:
        path = paths.artifact("baseline", name)
        if path.exists():
            other = classifiers.load(path)
            if other.header.sha256 != target.header.sha256 and other.about.facts == target.about.facts:
                sources[f"baseline/{name}"] = other.model
    return sources


def _requested_attacks(
    request: EvaluationRequest, known: Mapping[str, AttackSettings], sources: tuple[str, ...], has_gate: bool
) -> dict[str, AttackSettings]:
    """Returns the requested attacks by name, with the steps of the request. Raises UserError for unknown names."""
    attacks: dict[str, AttackSettings] = {}
    for name in request.attacks:
        if name in PRESETS:
            attacks |= presets.preset(name, sources, has_gate)
    for name in request.attacks:
        if name in attacks or name in PRESETS:
            continue  # settings of a preset take precedence
        if name == "transfer":
            attacks[name] = _transfer_attack(known, sources)
        elif name in known:
            attacks[name] = known[name]
        elif user_code.is_code_reference(name):
            user_code.load_function(name)  # fails before the evaluation starts
            attacks[Path(name).name] = Custom(kind="own", function=name)
        else:
            raise UserError(
                f"--attack {name}: unknown; attacks are {files.join_names(known)}, "
                f"presets are {files.join_names(PRESETS)}, and path/to/file.py:function is a custom attack"
            )
    return _with_steps(attacks, request.steps)


def _transfer_attack(known: Mapping[str, AttackSettings], sources: tuple[str, ...]) -> Transfer:
    """Returns a transfer attack from all `sources`."""
    if not sources:
        raise UserError("--attack transfer: there is no other network of this project to transfer from")
    settings = known.get("transfer")
    if isinstance(settings, Transfer):
        return settings.model_copy(update={"sources": sources})
    return Transfer(kind="transfer", **presets.ASCENT, sources=sources)


def _with_steps(attacks: dict[str, AttackSettings], steps: int | None) -> dict[str, AttackSettings]:
    iterative = [name for name, attack in attacks.items() if hasattr(attack, "steps")]
    if steps is None:
        return attacks
    if attacks and not iterative:
        raise UserError(f"--steps: {files.join_names(attacks)} has no number of steps")
    return attacks | {name: attacks[name].model_copy(update={"steps": steps}) for name in iterative}


def _check_dataset(path: str, classifier: Classifier, facts: DatasetInfo, sha256: str) -> None:
    expected = classifier.about.facts
    shape, expected_shape = ((each.channels, each.height, each.width) for each in (facts, expected))
    if shape != expected_shape or facts.class_names != expected.class_names:
        raise UserError(
            f"{path}: trained for {expected.classes} classes of images {expected_shape}, but {paths.DATASET} has "
            f"{facts.classes} classes of {shape}"
        )
    if classifier.header.inputs.get("dataset") != sha256:
        console.warn(f"{path} was trained on another data set: test images may have been among its training images")

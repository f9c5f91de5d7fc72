"""Builds, saves and loads classifiers: architecture settings, initialisation, and artifacts of kind `classifier`.

To add a backbone: write a module in `advmoe/models`, add its name to `BackboneKind` and its class to `BACKBONES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveFloat, Settings, validate
from advmoe.data.dataset import DatasetInfo
from advmoe.models.cnn import SmallCnn
from advmoe.models.gate import Gate
from advmoe.models.mixture import ConfidenceHeads, ConfidentExperts, Mixing, MixtureOfExperts, UniformGate
from advmoe.models.resnet import ResNet18
from advmoe.models.resnet50 import ResNet50
from advmoe.models.wideresnet import WideResNet28
from advmoe.runtime.machine import derive_seed

KIND = "classifier"
BackboneKind = Literal["resnet18", "resnet50", "wideresnet28", "cnn"]
BACKBONES: dict[BackboneKind, Callable[..., nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "wideresnet28": WideResNet28,
    "cnn": SmallCnn,
}


Width = Annotated[int, Field(gt=0, le=4096, strict=True)]  # channels; bounds the memory that a file header can request


class BackboneSettings(Settings):
    """A backbone. `width` 64 is the full ResNet-18, ResNet-50 or WideResNet-28-10; other widths scale it."""

    kind: BackboneKind
    width: Width


class GateSettings(Settings):
    """`width`: channels of the gate's first layer; `temperature`: above 1 the weights are softer, below 1 sharper."""

    width: Width
    temperature: PositiveFloat


class UniformGateSettings(Settings):
    """All experts have equal weight."""

    kind: Literal["uniform"]


class ConfidenceSettings(Settings):
    """No gate network: each expert outputs a confidence; `temperature` of the softmax over the confidences."""

    kind: Literal["confidence"]
    temperature: PositiveFloat


class PlainArchitecture(Settings):
    """A single backbone."""

    kind: Literal["plain"]
    backbone: BackboneSettings


class MixtureArchitecture(Settings):
    """Several backbones of one kind, named by `experts`, and a gate."""

    kind: Literal["mixture"]
    backbone: BackboneSettings
    experts: tuple[str, ...]
    gate: GateSettings | UniformGateSettings | ConfidenceSettings
    mixing: Mixing


Architecture = Annotated[PlainArchitecture | MixtureArchitecture, Field(discriminator="kind")]


class ClassifierMetadata(Settings):
    """The `about` section in the header of a classifier artifact."""

    architecture: Architecture
    facts: DatasetInfo


@dataclass(frozen=True)
class Classifier:
    """A loaded network and its header. `model` maps pixels in [0, 1], (B, C, H, W), to logits (B, K)."""

    model: nn.Module
    about: ClassifierMetadata
    header: artifacts.Header


def build(architecture: PlainArchitecture | MixtureArchitecture, facts: DatasetInfo, *seed: object) -> nn.Module:
    """Returns a new network in channels_last, initialised from `seed` alone; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*seed, "init"))  # torch.manual_seed reseeds GPUs too
        if isinstance(architecture, PlainArchitecture):
            model = _backbone(architecture.backbone, facts)
        else:
            model = _mixture(architecture, facts)
    return model.to(memory_format=torch.channels_last)


def _backbone(backbone: BackboneSettings, facts: DatasetInfo) -> nn.Module:
    return BACKBONES[backbone.kind](
        channels=facts.channels, classes=facts.classes, width=backbone.width, mean=facts.mean, std=facts.std
    )


def _mixture(architecture: MixtureArchitecture, facts: DatasetInfo) -> MixtureOfExperts:
    experts = [_backbone(architecture.backbone, facts) for _ in architecture.experts]
    match architecture.gate:
        case UniformGateSettings():
            return MixtureOfExperts(experts, UniformGate(len(experts)), architecture.mixing)
        case ConfidenceSettings(temperature=temperature):
            features = experts[0].get_submodule("classify").in_features
            assert isinstance(features, int)
            heads = ConfidenceHeads(experts=len(experts), features=features, temperature=temperature)
            return ConfidentExperts(experts, heads, architecture.mixing)
        case GateSettings(width=width, temperature=temperature):
            gate = Gate(
                channels=facts.channels,
                experts=len(experts),
                width=width,
                temperature=temperature,
                mean=facts.mean,
                std=facts.std,
            )
            return MixtureOfExperts(experts, gate, architecture.mixing)


def save(
    path: Path,
    model: nn.Module,
    architecture: PlainArchitecture | MixtureArchitecture,
    facts: DatasetInfo,
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    metrics: Mapping[str, Any],
    seconds: float,
) -> None:
    """Writes a classifier as an artifact."""
    about = ClassifierMetadata(architecture=architecture, facts=facts).model_dump(mode="json")
    artifacts.save(
        path,
        KIND,
        state_dict_of(model),
        about=about,
        params=params,
        inputs=inputs,
        seed=seed,
        metrics=metrics,
        seconds=seconds,
    )


def load(path: Path) -> Classifier:
    """Loads a classifier in eval mode.

    Raises UserError if the file is missing, damaged or not a classifier, or if its tensors do not match its header.
    """
    artifact = artifacts.load(path, KIND)
    about = validate(artifact.header.about, ClassifierMetadata, f"{path}: header")
    _check_tensors(path, about, artifact.tensors)
    model = build(about.architecture, about.facts, 0)
    model.load_state_dict(artifact.tensors, strict=False)
    return Classifier(model.eval(), about, artifact.header)


def _check_tensors(path: Path, about: ClassifierMetadata, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError if tensors and header do not match; runs before memory is allocated for the network."""
    architecture = about.architecture
    if isinstance(architecture, MixtureArchitecture) and not 0 < len(architecture.experts) <= len(tensors):
        raise UserError(f"{path}: has {len(tensors)} tensors for {len(architecture.experts)} experts")
    with torch.device("meta"):  # shapes without memory
        model = build(architecture, about.facts, 0)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in state_dict_of(model).items()}
    stored = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
    if wrong:
        raise UserError(f"{path}: tensor '{wrong[0]}' does not match the architecture in the header")
    not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        raise UserError(f"{path}: tensor '{not_finite[0]}' contains values that are not finite")


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the `state_dict` without BatchNorm's `num_batches_tracked`, which has no effect at a fixed momentum."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def build_mixture(
    architecture: MixtureArchitecture, facts: DatasetInfo, experts: Sequence[nn.Module], *seed: object
) -> MixtureOfExperts:
    """Returns a mixture of copies of the trained `experts`, in the order of the architecture, with a new gate."""
    mixture = build(architecture, facts, *seed)
    assert isinstance(mixture, MixtureOfExperts)
    assert len(experts) == len(architecture.experts)
    for fresh, trained in zip(mixture.experts, experts, strict=True):
        fresh.load_state_dict(trained.state_dict())
    return mixture


def uniform_mixture(mixture: MixtureOfExperts) -> MixtureOfExperts:
    """Returns a mixture of the same experts (shared, not copied) with equal weights."""
    assert mixture.mixing != "top1", "a uniform mixture has no top-1 expert"
    return MixtureOfExperts(list(mixture.experts), UniformGate(len(mixture.experts)), mixture.mixing)


def with_log_softmax(classifier: Classifier) -> nn.Module:
    """Returns the model followed by a log-softmax, in eval mode. The output of a mixture is unchanged by it."""
    return nn.Sequential(classifier.model, nn.LogSoftmax(dim=1)).eval()

"""Classifiers as files: which network an artifact describes, how it is built, saved and loaded.

A new backbone is a file in `advmoe/models`, its name in BackboneKind and a line in BACKBONES.
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
from advmoe.data.dataset import Facts
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


Width = Annotated[int, Field(gt=0, le=4096, strict=True)]  # channels; the header of a file may ask for any memory


class Backbone(Settings):
    """A single network. `width`: 64 is the full ResNet-18, ResNet-50 and WideResNet-28-10; others are scaled by it."""

    kind: BackboneKind
    width: Width


class GateSettings(Settings):
    """`width`: channels of the gate's first layer; `temperature`: above 1 the weights get softer, below 1 sharper."""

    width: Width
    temperature: PositiveFloat


class NoGate(Settings):
    """All experts weigh alike."""

    kind: Literal["uniform"]


class OwnConfidence(Settings):
    """No gate beside the experts: each says how sure it is; `temperature` of the softmax over that."""

    kind: Literal["confidence"]
    temperature: PositiveFloat


class Plain(Settings):
    """A single backbone."""

    kind: Literal["plain"]
    backbone: Backbone


class Mixture(Settings):
    """Several backbones, by name, and a gate."""

    kind: Literal["mixture"]
    backbone: Backbone
    experts: tuple[str, ...]
    gate: GateSettings | NoGate | OwnConfidence
    mixing: Mixing


Architecture = Annotated[Plain | Mixture, Field(discriminator="kind")]


class About(Settings):
    """What an artifact of kind `classifier` says of itself."""

    architecture: Architecture
    facts: Facts


@dataclass(frozen=True)
class Classifier:
    """A network with its description. `model` maps pixels in [0, 1], (B, C, H, W), to logits (B, K)."""

    model: nn.Module
    about: About
    header: artifacts.Header


def build(architecture: Plain | Mixture, facts: Facts, *seed: object) -> nn.Module:
    """A fresh network, initialised from `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*seed, "init"))  # torch.manual_seed reseeds GPUs, too
        if isinstance(architecture, Plain):
            model = _backbone(architecture.backbone, facts)
        else:
            model = _mixture(architecture, facts)
    return model.to(memory_format=torch.channels_last)


def _backbone(backbone: Backbone, facts: Facts) -> nn.Module:
    return BACKBONES[backbone.kind](
        channels=facts.channels, classes=facts.classes, width=backbone.width, mean=facts.mean, std=facts.std
    )


def _mixture(architecture: Mixture, facts: Facts) -> MixtureOfExperts:
    experts = [_backbone(architecture.backbone, facts) for _ in architecture.experts]
    match architecture.gate:
        case NoGate():
            return MixtureOfExperts(experts, UniformGate(len(experts)), architecture.mixing)
        case OwnConfidence(temperature=temperature):
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
    architecture: Plain | Mixture,
    facts: Facts,
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    metrics: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write a classifier as an artifact."""
    about = About(architecture=architecture, facts=facts).model_dump(mode="json")
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
    """Read a classifier. Raises UserError if the file is missing, damaged, no classifier, or its tensors do not fit."""
    artifact = artifacts.load(path, KIND)
    about = validate(artifact.header.about, About, f"{path}: header")
    _check_tensors(path, about, artifact.tensors)
    model = build(about.architecture, about.facts, 0)
    model.load_state_dict(artifact.tensors, strict=False)
    return Classifier(model.eval(), about, artifact.header)


def _check_tensors(path: Path, about: About, tensors: Mapping[str, Tensor]) -> None:
    """Before memory is taken for a network: it may be any that somebody wrote into a header."""
    architecture = about.architecture
    if isinstance(architecture, Mixture) and not 0 < len(architecture.experts) <= len(tensors):
        raise UserError(f"{path}: has {len(tensors)} tensors for {len(architecture.experts)} experts")
    with torch.device("meta"):  # shapes without content
        model = build(architecture, about.facts, 0)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in state_dict_of(model).items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(f"{path}: tensor '{wrong[0]}' does not fit the architecture that the header describes")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: tensor '{broken[0]}' holds numbers that are not finite")


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors worth keeping: BatchNorm's batch counter has no influence on anything here."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def build_mixture(architecture: Mixture, facts: Facts, experts: Sequence[nn.Module], *seed: object) -> MixtureOfExperts:
    """A mixture of trained `experts`, in the order of the architecture, with a fresh gate. The experts are copied."""
    mixture = build(architecture, facts, *seed)
    assert isinstance(mixture, MixtureOfExperts)
    assert len(experts) == len(architecture.experts)
    for fresh, trained in zip(mixture.experts, experts, strict=True):
        fresh.load_state_dict(trained.state_dict())
    return mixture


def uniform_mixture(mixture: MixtureOfExperts) -> MixtureOfExperts:
    """The same experts (shared, not copied) without the gate: every vote counts alike."""
    assert mixture.mixing != "top1", "the average of votes has no first among them"
    return MixtureOfExperts(list(mixture.experts), UniformGate(len(mixture.experts)), mixture.mixing)


def with_log_softmax(classifier: Classifier) -> nn.Module:
    """Pixels in [0, 1] in, log-probabilities out, eval mode. For a mixture the last step changes nothing."""
    return nn.Sequential(classifier.model, nn.LogSoftmax(dim=1)).eval()

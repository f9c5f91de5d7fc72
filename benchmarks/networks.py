"""Mixtures to take times of: the architecture of the pipeline, at any size.

What weights hold does not change what they cost, so most are random. Where robust accuracies stand beside the times, a
mixture has been fitted to its images under attack for a few steps: a random network falls to noise in the last digit.

Shapes: N images, C channel, H/W pixels.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from advmoe.attacks import engine, registry
from advmoe.attacks.ball import LInf
from advmoe.attacks.fgsm import Fgsm
from advmoe.data.dataset import Facts
from advmoe.models import classifiers
from advmoe.models.classifiers import Backbone, GateSettings, Mixture, Plain
from advmoe.models.layers import ConvNorm
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import machine
from benchmarks import checkpoints

EXPERTS = 9
GATE = GateSettings(width=16, temperature=1.0)
CLASS_NAMES = tuple("0123456789")
FITTING = 12  # steps: enough to leave some images standing, and seconds


@dataclass(frozen=True)
class Subject:
    """A network in eval mode, images (N, C, H, W) in [0, 1], labels (N,), and the L-inf radius to attack at."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    epsilon: float

    def first(self, count: int) -> "Subject":
        """On the first `count` images only."""
        return Subject(self.name, self.model, self.images[:count], self.labels[:count], self.epsilon)


def checkpoint(name: str, count: int) -> Subject:
    """A robust network of others, at the epsilon of its reference decisions."""
    place = machine.device()
    images, labels = (each.to(place) for each in checkpoints.images(name, count))
    return Subject(name, checkpoints.model(name).to(place), images, labels, checkpoints.reference(name).epsilon)


def mixture_subject(name: str, images_NCHW: Tensor, labels_N: Tensor, *, width: int, epsilon: float) -> Subject:
    """A mixture that has learned these images under FGSM."""
    model = settled(mixture(images_NCHW, width=width), images_NCHW)
    fit(model, images_NCHW, labels_N, epsilon)
    return Subject(name, model, images_NCHW, labels_N, epsilon)


def fit(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, epsilon: float) -> None:
    """A few steps of SGD on all images at once, attacked anew for each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    craft = registry.bind(Fgsm(kind="fgsm"), {})
    for step in range(FITTING):
        attacked = engine.attack_without_early_stop(
            model, images_NCHW, labels_N, craft, ball=LInf(epsilon), seed=step, purpose="fit", precision="float32",
            batch_size=len(labels_N),
        )  # fmt: skip
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model.train()(attacked), labels_N))
        optimizer.step()
    model.eval()


def mixture(images_NCHW: Tensor, *, width: int, experts: int = EXPERTS) -> MixtureOfExperts:
    """Nine experts (or so many) of ResNet-18 and a gate, for images of this shape, where they are."""
    names = tuple(f"expert-{number}" for number in range(experts))
    backbone = Backbone(kind="resnet18", width=width)
    architecture = Mixture(kind="mixture", backbone=backbone, experts=names, gate=GATE, mixing="probabilities")
    model = classifiers.build(architecture, facts(images_NCHW), "benchmark")
    assert isinstance(model, MixtureOfExperts)
    return model.to(images_NCHW.device).eval()


def lone_expert(images_NCHW: Tensor, *, width: int) -> nn.Module:
    """One expert without anything around it."""
    backbone = Backbone(kind="resnet18", width=width)
    model = classifiers.build(Plain(kind="plain", backbone=backbone), facts(images_NCHW), "benchmark")
    return model.to(images_NCHW.device).eval()


def as_documented(model: nn.Module) -> nn.Module:
    """A copy in eval mode and PyTorch's default memory format, as the examples of other libraries have it."""
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()


def settled(model: nn.Module, images_NCHW: Tensor) -> nn.Module:
    """The same network, its BatchNorms with the statistics of these images."""
    for layer in model.modules():
        if isinstance(layer, ConvNorm):
            layer.norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images_NCHW)
    return model.eval()


def facts(images_NCHW: Tensor) -> Facts:
    """What a network must know of such images."""
    _, channels, height, width = images_NCHW.shape
    return Facts(
        channels=1 if channels == 1 else 3,
        height=height,
        width=width,
        class_names=CLASS_NAMES,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def labelled_digits(count: int) -> tuple[Tensor, Tensor]:
    """The first embedded digits, (N, 1, 8, 8) in [0, 1], and their labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images[:count] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return torch.from_numpy(pixels), torch.from_numpy(labels[:count].astype(np.int64))


def digits(count: int) -> Tensor:
    """The same without labels."""
    return labelled_digits(count)[0]


def labelled_photographs(count: int) -> tuple[Tensor, Tensor]:
    """The first CIFAR-10 test images (N, 3, 32, 32) in [0, 1], and their labels (N,)."""
    return checkpoints.images("resnet4b-cifar", count)


def photographs(count: int, side: int = 32) -> Tensor:
    """The same without labels, (N, 3, side, side), made smaller where asked."""
    images, _ = labelled_photographs(count)
    return images if side == 32 else functional.adaptive_avg_pool2d(images, side)


def gradient_flops(model: nn.Module, image_CHW: Tensor) -> int:
    """Floating-point operations of a forward pass and one back to the pixels of an image; a multiply-add is two."""
    with engine.attack_mode(model, "float32") as cheap, FlopCounterMode(display=False) as counter, torch.enable_grad():
        torch.autograd.backward(cheap(image_CHW[None].clone().requires_grad_(True)).sum())
    return int(counter.get_total_flops())

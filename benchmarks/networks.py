"""Networks for the benchmarks: mixtures with the architecture of the pipeline, at any size.

The time does not depend on the weights, so most are random. Where robust accuracy is reported, too, a mixture is
trained adversarially on its images for a few steps: a random network changes its decisions by rounding errors.

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
from advmoe.data.dataset import DatasetInfo
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, GateSettings, MixtureArchitecture, PlainArchitecture
from advmoe.models.layers import ConvNorm
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import machine
from benchmarks import checkpoints

EXPERTS = 9
GATE = GateSettings(width=16, temperature=1.0)
CLASS_NAMES = tuple("0123456789")
FIT_STEPS = 12  # steps: enough for some robust images, within seconds


@dataclass(frozen=True)
class BenchmarkTarget:
    """A network in eval mode, images (N, C, H, W) in [0, 1], labels (N,), and the L-inf radius to attack at."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    epsilon: float

    def first(self, count: int) -> "BenchmarkTarget":
        """Returns the same with the first `count` images only."""
        return BenchmarkTarget(self.name, self.model, self.images[:count], self.labels[:count], self.epsilon)


def checkpoint_target(name: str, count: int) -> BenchmarkTarget:
    """Returns a published robust network, with the epsilon of its reference decisions."""
    device = machine.device()
    images, labels = (tensor.to(device) for tensor in checkpoints.load_images(name, count))
    return BenchmarkTarget(
        name, checkpoints.load_model(name).to(device), images, labels, checkpoints.load_reference(name).epsilon
    )


def mixture_target(name: str, images_NCHW: Tensor, labels_N: Tensor, *, width: int, epsilon: float) -> BenchmarkTarget:
    """Returns a mixture that was trained on these images with FGSM."""
    model = set_batchnorm_statistics(mixture(images_NCHW, width=width), images_NCHW)
    fit_adversarially(model, images_NCHW, labels_N, epsilon)
    return BenchmarkTarget(name, model, images_NCHW, labels_N, epsilon)


def fit_adversarially(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, epsilon: float) -> None:
    """Trains `model` in place: FIT_STEPS steps of SGD on all images at once, attacked by FGSM in each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    craft = registry.bind(Fgsm(kind="fgsm"), {})
    for step in range(FIT_STEPS):
        attacked = engine.attack_without_early_stop(
            model, images_NCHW, labels_N, craft, ball=LInf(epsilon), seed=step, purpose="fit", precision="float32",
            batch_size=len(labels_N),
        )  # fmt: skip
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model.train()(attacked), labels_N))
        optimizer.step()
    model.eval()


def mixture(images_NCHW: Tensor, *, width: int, experts: int = EXPERTS) -> MixtureOfExperts:
    """Returns a mixture of ResNet-18 experts for images of this shape, on their device, in eval mode."""
    names = tuple(f"expert-{number}" for number in range(experts))
    backbone = BackboneSettings(kind="resnet18", width=width)
    architecture = MixtureArchitecture(
        kind="mixture", backbone=backbone, experts=names, gate=GATE, mixing="probabilities"
    )
    model = classifiers.build(architecture, facts(images_NCHW), "benchmark")
    assert isinstance(model, MixtureOfExperts)
    return model.to(images_NCHW.device).eval()


def single_expert(images_NCHW: Tensor, *, width: int) -> nn.Module:
    """Returns one expert without a gate, in eval mode."""
    backbone = BackboneSettings(kind="resnet18", width=width)
    model = classifiers.build(PlainArchitecture(kind="plain", backbone=backbone), facts(images_NCHW), "benchmark")
    return model.to(images_NCHW.device).eval()


def contiguous_copy(model: nn.Module) -> nn.Module:
    """Returns a copy in eval mode and PyTorch's default memory format, as in the examples of other libraries."""
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()


def set_batchnorm_statistics(model: nn.Module, images_NCHW: Tensor) -> nn.Module:
    """Sets the BatchNorm statistics of `model` to those of these images; returns it in eval mode."""
    for layer in model.modules():
        if isinstance(layer, ConvNorm):
            layer.norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images_NCHW)
    return model.eval()


def facts(images_NCHW: Tensor) -> DatasetInfo:
    """Returns the facts of a data set of such images, from which networks are built."""
    _, channels, height, width = images_NCHW.shape
    return DatasetInfo(
        channels=1 if channels == 1 else 3,
        height=height,
        width=width,
        class_names=CLASS_NAMES,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def labelled_digits(count: int) -> tuple[Tensor, Tensor]:
    """Returns the first digits of scikit-learn, (N, 1, 8, 8) in [0, 1], and their labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images[:count] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return torch.from_numpy(pixels), torch.from_numpy(labels[:count].astype(np.int64))


def digit_images(count: int) -> Tensor:
    """Returns the first digits of scikit-learn, (N, 1, 8, 8) in [0, 1]."""
    return labelled_digits(count)[0]


def labelled_cifar10(count: int) -> tuple[Tensor, Tensor]:
    """Returns the first CIFAR-10 test images (N, 3, 32, 32) in [0, 1], and their labels (N,)."""
    return checkpoints.load_images("resnet4b-cifar", count)


def cifar10_images(count: int, side: int = 32) -> Tensor:
    """Returns the first CIFAR-10 test images in [0, 1], downsampled to (N, 3, side, side)."""
    images, _ = labelled_cifar10(count)
    return images if side == 32 else functional.adaptive_avg_pool2d(images, side)


def gradient_flops(model: nn.Module, image_CHW: Tensor) -> int:
    """Returns the FLOPs of a forward and a backward pass to the pixels of one image; a multiply-add counts as two."""
    with engine.attack_mode(model, "float32") as frozen, FlopCounterMode(display=False) as counter, torch.enable_grad():
        torch.autograd.backward(frozen(image_CHW[None].clone().requires_grad_(True)).sum())
    return int(counter.get_total_flops())

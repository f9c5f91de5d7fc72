"""What training costs, so that comparisons can be made at equal cost: counted work, which equal runs agree on.

Seconds and memory are of the circumstances and stand in an artifact's sidecar.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.attacks import engine
from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.models import inference
from advmoe.models.classifiers import Classifier
from advmoe.models.mixture import MixtureOfExperts

SAMPLE_SIZE = 2  # images to count on: BatchNorm cannot learn from one
ROUNDS = 2  # learning steps to count: who alternates between two parts has two kinds of steps


class HasLoss(Protocol):
    """What of a learner is needed to count its work."""

    model: nn.Module

    def begin(self) -> None:
        """A step begins."""
        ...

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """The scalar to minimise."""
        ...


@dataclass(frozen=True)
class FlopsPerImage:
    """Floating-point operations (a multiplication and an addition are two) that one image costs: `forward` as in use,
    `pixels` backwards from the output to the pixels, `learning` for loss and gradients of a training step.
    """

    forward: int
    pixels: int
    learning: int


def measure_flops(learner: HasLoss, images_BCHW: Tensor, labels_B: Tensor) -> FlopsPerImage:
    """Counted on the first images of a batch of floats in [0, 1]; the learner is left as it was."""
    images, labels = images_BCHW[:SAMPLE_SIZE], labels_B[:SAMPLE_SIZE]
    # as defined, not as attacks run it: what a machine saves, a matrix for a map of four pixels, is no smaller network
    with inference.eval_mode(learner.model) as network:
        with _counted() as forward, torch.no_grad():
            network(images)
        pixels = images.clone().requires_grad_(True)
        with _counted() as both, torch.enable_grad():
            torch.autograd.backward(network(pixels).sum())  # the counter does not bear autograd.grad
    trial = copy.deepcopy(learner)
    if isinstance(trial.model, MixtureOfExperts):
        trial.model.checkpointing = False  # to compute again is a price of memory: equal training stays equal
    with _counted() as learning:
        for _ in range(ROUNDS):
            trial.begin()
            torch.autograd.backward(trial.loss(images, labels, images))
    once = forward.get_total_flops()
    return FlopsPerImage(
        forward=once // len(images),
        pixels=(both.get_total_flops() - once) // len(images),
        learning=learning.get_total_flops() // (ROUNDS * len(images)),
    )


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


@dataclass(frozen=True)
class TrainingCost:
    """`parameters` of the network, `flops_per_image` of one forward pass; images gone through in training: attacked
    forwards and backwards, and learned from; `training_flops` of all that, and with what the network was built from.
    """

    parameters: int
    flops_per_image: int
    crafting_forward: int
    crafting_backward: int
    learning: int
    training_flops: int
    total_training_flops: int

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def parameters(model: nn.Module) -> int:
    """Numbers that training may choose."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_cost(
    model: nn.Module, each: FlopsPerImage, passes: engine.PassCount, learned: int, before: int
) -> TrainingCost:
    """Of a training run that learned from `learned` images; `before`: operations spent on what it started from."""
    own = each.forward * passes.forward + each.pixels * passes.backward + each.learning * learned
    return TrainingCost(parameters(model), each.forward, passes.forward, passes.backward, learned, own, own + before)


def total_prior_flops(classifiers: Mapping[str, Classifier]) -> int:
    """Operations that training these experts, by name, took in all. Raises UserError when one does not say."""
    return sum(prior_flops(paths.artifact("pretrain", name), each) for name, each in classifiers.items())


def prior_flops(path: Path, classifier: Classifier) -> int:
    """Operations that training the classifier in this file took in all. Raises UserError when it does not say."""
    try:
        return int(classifier.header.metrics["cost"]["total_training_flops"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: does not say what its training cost; `dvc repro` builds it again") from None

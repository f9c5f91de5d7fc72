"""The cost of training in floating-point operations, for comparisons at equal cost. Equal runs have equal counts.

Seconds and memory depend on the machine and are in an artifact's sidecar.

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

SAMPLE_SIZE = 2  # images to count on; BatchNorm in train mode needs two
STEPS = 2  # training steps to count: tasks that alternate between two parts have two kinds of steps


class HasLoss(Protocol):
    """The part of a TrainingTask that is needed to count its operations."""

    model: nn.Module

    def on_step_start(self) -> None:
        """Called before each training step."""
        ...

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns the scalar to minimise."""
        ...


@dataclass(frozen=True)
class FlopsPerImage:
    """Floating-point operations per image (a multiplication and an addition are two): `forward` in eval mode, `pixels`
    of a backward pass to the pixels, `learning` for loss and gradients of a training step.
    """

    forward: int
    pixels: int
    learning: int


def measure_flops(task: HasLoss, images_BCHW: Tensor, labels_B: Tensor) -> FlopsPerImage:
    """Counts on the first images of a batch of floats in [0, 1]; the task is left unchanged."""
    images, labels = images_BCHW[:SAMPLE_SIZE], labels_B[:SAMPLE_SIZE]
    # the network as defined, not as attacks run it: their optimisations do not make it a smaller network
    with inference.eval_mode(task.model) as network:
        with _flop_counter() as forward, torch.no_grad():
            network(images)
        pixels = images.clone().requires_grad_(True)
        with _flop_counter() as both, torch.enable_grad():
            torch.autograd.backward(network(pixels).sum())  # the counter does not support autograd.grad
    trial = copy.deepcopy(task)
    if isinstance(trial.model, MixtureOfExperts):
        trial.model.checkpointing = (
            False  # recomputation saves memory and is not counted, so that equal training has equal cost
        )
    with _flop_counter() as learning:
        for _ in range(STEPS):
            trial.on_step_start()
            torch.autograd.backward(trial.loss(images, labels, images))
    once = forward.get_total_flops()
    return FlopsPerImage(
        forward=once // len(images),
        pixels=(both.get_total_flops() - once) // len(images),
        learning=learning.get_total_flops() // (STEPS * len(images)),
    )


@contextmanager
def _flop_counter() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


@dataclass(frozen=True)
class TrainingCost:
    """`parameters` of the network and `flops_per_image` of one forward pass; numbers of images in forward and backward
    passes of attacks and in training steps (`learning`); `training_flops` of all these, and the total that includes
    what the network was built from.
    """

    parameters: int
    flops_per_image: int
    crafting_forward: int
    crafting_backward: int
    learning: int
    training_flops: int
    total_training_flops: int

    def as_dict(self) -> dict[str, int]:
        """Returns the fields for JSON."""
        return asdict(self)


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters; BatchNorm statistics are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_cost(
    model: nn.Module, per_image: FlopsPerImage, passes: engine.PassCount, images_learned: int, prior: int
) -> TrainingCost:
    """Returns the cost of a training run; `prior`: operations of the training that it starts from."""
    own = per_image.forward * passes.forward + per_image.pixels * passes.backward + per_image.learning * images_learned
    return TrainingCost(
        parameters=count_parameters(model),
        flops_per_image=per_image.forward,
        crafting_forward=passes.forward,
        crafting_backward=passes.backward,
        learning=images_learned,
        training_flops=own,
        total_training_flops=own + prior,
    )


def total_prior_flops(classifiers: Mapping[str, Classifier]) -> int:
    """Returns the operations that training these experts, by name, took in total. Raises UserError when a file does not
    hold them.
    """
    return sum(prior_flops(paths.artifact("pretrain", name), each) for name, each in classifiers.items())


def prior_flops(path: Path, classifier: Classifier) -> int:
    """Returns the operations that training the classifier in this file took in total. Raises UserError when the file
    does not hold them.
    """
    try:
        return int(classifier.header.metrics["cost"]["total_training_flops"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: does not hold its training cost; run `dvc repro` to build it again") from None

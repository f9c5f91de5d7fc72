"""The settings of a training run, the same for an expert, a baseline and the mixture; learning rate and optimizer."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from advmoe.core.settings import Fraction01, NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from advmoe.data.batches import Augmentation
from advmoe.models.inference import Precision


class Optimizer(Settings):
    """SGD with Nesterov momentum. `lr` is the peak of the schedule; weight decay spares BatchNorm and biases."""

    lr: PositiveFloat
    momentum: Fraction01
    weight_decay: NonNegativeFloat


class Schedule(Settings):
    """Linear warm-up over a share of all steps, then constant or a cosine down to 0."""

    warmup: Fraction01
    decay: Literal["cosine", "constant"]


class Validation(Settings):
    """The validation after each epoch.

    `steps` and `step_size` (relative to epsilon) are PGD's; `gap`: how much FGSM accuracy may exceed PGD accuracy
    before the overfitting alarm; `images`: how many are used, at most.
    """

    steps: PositiveInt
    step_size: PositiveFloat
    gap: Fraction01
    images: PositiveInt


class TrainingConfig(Settings):
    """The settings of a training run, except model, adversary and seed. The last epoch is kept.

    `micro_batch`: maximum number of images attacked and learned from at once, None for the whole batch (see
    `advmoe.training.microbatches`); `clip`: maximum gradient norm, 0 for none; `ema`: decay of the averaged weights,
    which are then the ones kept, 0 for none.
    """

    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    micro_batch: Annotated[int, Field(ge=2)] | None
    optimizer: Optimizer
    schedule: Schedule
    clip: NonNegativeFloat
    ema: Annotated[float, Field(ge=0, lt=1)]
    augmentation: Augmentation
    precision: Precision

    @property
    def gradients(self) -> int:
        """Gradients that a step computes of its batch."""
        return 1


class ValidatedTrainingConfig(TrainingConfig):
    """The same with validation; `selection`: keep the last epoch or the best one on the validation split;
    `sync_batchnorm`: where several GPUs train, BatchNorm normalises over the images of all of them, not per process;
    `awp`: how far weights are perturbed for each gradient, relative to their norm, 0 for none (see
    `advmoe.training.weight_perturbation`).
    """

    awp: Annotated[float, Field(ge=0, lt=1)]
    sync_batchnorm: bool
    selection: Literal["last", "best"]
    validation: Validation

    @property
    def gradients(self) -> int:
        """Gradients that a step computes of its batch: one more where weights are perturbed along the first."""
        return 2 if self.awp else 1


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Returns the factor on the learning rate at `step` of `steps`, in (0, 1]."""
    rising = schedule.warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule.decay == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def parameter_groups(modules: Iterable[tuple[nn.Module, float]], optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns SGD parameter groups for (module, peak learning rate) pairs, split by whether weight decay applies."""
    groups: list[dict[str, Any]] = []
    for module, peak in modules:
        parameters = list(module.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups.append({"params": matrices, "lr": peak, "weight_decay": optimizer.weight_decay})
        groups.append({"params": vectors, "lr": peak, "weight_decay": 0.0})
    return groups


def sgd(modules: Iterable[tuple[nn.Module, float]], optimizer: Optimizer) -> torch.optim.SGD:
    """Returns the SGD optimizer for (module, peak learning rate) pairs."""
    groups = parameter_groups(modules, optimizer)
    return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, nesterov=optimizer.momentum > 0)

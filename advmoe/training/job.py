"""A training job: the task that learns, the settings of the run, and its result.

Shapes: B batch, N images, C channel, H/W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advmoe.data.batches import batches_per_epoch
from advmoe.data.dataset import Dataset
from advmoe.training.batch_attacks import Adversary
from advmoe.training.config import TrainingConfig, lr_factor
from advmoe.training.flops import TrainingCost

DIGITS = 6  # decimals of the numbers in histories: enough for any accuracy, and equal on equal runs

Row = dict[str, Any]


class TrainingTask(Protocol):
    """A model with its optimizer and its loss: what differs between an expert, a baseline and the mixture."""

    model: nn.Module

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns a new optimizer over the model's parameters."""
        ...

    def on_step_start(self) -> None:
        """Called before each training step; puts the model, or the parts that learn in it, into train mode."""
        ...

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns the scalar to minimise on one (attacked) batch or micro-batch: a mean over its images."""
        ...

    def on_after_backward(self) -> None:
        """Called with the gradients of a step, before they are clipped and applied."""
        ...

    def validation_metrics(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """Returns additional columns of the history, computed from clean and attacked validation images."""
        ...

    def on_epoch_end(self) -> None:
        """Called after each epoch; resets the statistics of the epoch."""
        ...

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The columns of `validation_metrics` that every epoch has."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that the task carries from step to step, except the model's."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a `state_dict`. Raises UserError, and changes nothing, for one that does not fit."""
        ...


@dataclass(frozen=True)
class TrainingJob:
    """The settings of one training run.

    `name` and `seed` seed the random streams; `epsilon`: L-inf radius of PGD batches and of validation; `select_by`:
    the column of the history that selection maximises. Without validation (a plain TrainingConfig) the history holds
    losses only. `prior_flops`: floating-point operations of the training of the networks it starts from;
    `checkpoint_dir`: folder of checkpoints, None for none.
    """

    name: str
    seed: int
    dataset: Dataset
    config: TrainingConfig
    adversary: Adversary
    epsilon: float
    select_by: str
    prior_flops: int = 0
    checkpoint_dir: Path | None = None

    @property
    def settings(self) -> list[object]:
        """All that determines the run, except the images."""
        return [self.seed, self.config, self.adversary, self.epsilon, self.select_by, self.prior_flops]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return batches_per_epoch(len(self.dataset["train"]), self.config.batch_size)

    def lr_factor(self, step: int) -> float:
        """Returns the factor on the learning rate at a step of the run, in (0, 1]."""
        return lr_factor(self.config.schedule, step, self.config.epochs * self.steps_per_epoch)


@dataclass
class TrainingResult:
    """The trained model, one history row per epoch, the row of the selected epoch (`kept`), alarms and cost."""

    model: nn.Module
    history: list[Row]
    kept: Row
    alarms: list[str]
    cost: TrainingCost
    seconds: float = field(compare=False)

"""The state of a training run, so that a killed run resumes bit-identically.

A checkpoint holds every tensor and every random stream. For the order of images it holds the stream's state at the
beginning of the epoch: the order is drawn again from there.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advmoe.attacks.engine import PassCount
from advmoe.core.errors import UserError
from advmoe.runtime.checkpoints.manager import is_generator_state, tensor_specs
from advmoe.runtime.checkpoints.storage import Checkpoint, flatten, unflatten
from advmoe.runtime.machine import generator
from advmoe.training.config import ValidatedTrainingConfig
from advmoe.training.job import Row, TrainingJob, TrainingTask

STREAMS = ("shuffle", "adversary", "noise")  # purposes of the random streams
LOSSES = "epoch/losses"  # name of a tensor in a checkpoint
NOT_THIS_RUN = "is not a checkpoint of this run"


class DivergedError(UserError):
    """The loss, the weights or the outputs are no longer finite numbers."""


class Progress(BaseModel):
    """The JSON values of a checkpoint; `work` counts forward passes, backward passes and images learned from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    history: list[dict[str, int | float]]
    work: Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]
    seconds: NonNegativeFloat


@dataclass
class TrainerState:
    """All that changes from step to step, together with the task, whose model is trained in place.

    One random stream for each purpose: an attack with more restarts must not change the order of the images.
    `epoch_start`: state of `shuffle` at the beginning of the epoch; `losses`: of the steps of this epoch;
    `kept`, `kept_weights`: history row and weights of the epoch selected so far.
    """

    task: TrainingTask
    job: TrainingJob
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    averaged: AveragedModel | None
    shuffle: torch.Generator
    adversary: torch.Generator
    noise: torch.Generator
    epoch_start: Tensor
    passes: PassCount = field(default_factory=PassCount)
    images_learned: int = 0
    losses: list[Tensor] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)
    kept: Row = field(default_factory=dict)
    kept_weights: Mapping[str, Tensor] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def create(cls, task: TrainingTask, job: TrainingJob) -> "TrainerState":
        """Returns the state before the first step. The task's model must be on its device."""
        optimizer = task.optimizer()
        shuffle, adversary, noise = (generator(job.seed, job.name, purpose) for purpose in STREAMS)
        scheduler, averaged = LambdaLR(optimizer, job.lr_factor), _averaged(task.model, job.config.ema)
        return cls(task, job, optimizer, scheduler, averaged, shuffle, adversary, noise, shuffle.get_state())

    @property
    def model(self) -> nn.Module:
        """The model that is validated and kept: the one with averaged weights where there is one."""
        return self.task.model if self.averaged is None else self.averaged.module

    @property
    def position(self) -> tuple[int, int]:
        """Completed epochs, and steps of the current one."""
        return len(self.history), len(self.losses)

    @property
    def progress(self) -> str:
        """The position in words."""
        return f"{len(self.history)} epochs and {len(self.losses)} steps"

    @property
    def seconds(self) -> float:
        """Time spent on this run, including the time before it was resumed."""
        return time.monotonic() - self.started

    def check_finite(self) -> None:
        """Raises DivergedError, naming the batch, when the losses of this epoch or the weights are not finite."""
        where = f"in epoch {len(self.history) + 1}, batch"
        finite = torch.stack(self.losses).isfinite() if self.losses else torch.ones(1)
        if not finite.all():
            raise DivergedError(
                f"{self.job.name}: the loss became NaN or infinite {where} {int(finite.int().argmin()) + 1}"
            )
        if not all(tensor.isfinite().all() for tensor in self.task.model.state_dict().values()):
            raise DivergedError(f"{self.job.name}: the weights became NaN or infinite {where} {len(self.losses)}")

    def select_epoch(self) -> Row:
        """Returns the history row of the epoch to keep: the first of the best or the last, by `config.selection`."""
        config = self.job.config
        if isinstance(config, ValidatedTrainingConfig) and config.selection == "best":
            return max(self.history, key=lambda row: row[self.job.select_by], default={})
        return self.history[-1] if self.history else {}

    def checkpoint(self) -> Checkpoint:
        """Returns a checkpoint. Raises DivergedError when the losses or the weights are not finite."""
        self.check_finite()
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.task.model.state_dict(),
            "average": self.averaged.state_dict() if self.averaged is not None else {},
            "momentum": _momentum_buffers(self.optimizer),
            "weights": self.kept_weights,
            "task": self.task.state_dict(),
            "streams": self._stream_states(),
            "epoch": {"losses": torch.stack(self.losses)} if self.losses else {},
        }
        work = [self.passes.forward, self.passes.backward, self.images_learned]
        return Checkpoint(flatten(parts), {"history": self.history, "work": work, "seconds": self.seconds})

    def load(self, checkpoint: Checkpoint) -> None:
        """Loads a checkpoint. Raises UserError, and changes nothing, for one that is not of this run."""
        progress, parts = _progress(checkpoint), unflatten(checkpoint.tensors)
        _validate_tensors(self, checkpoint.tensors, progress.history)
        device = next(self.task.model.parameters()).device
        self.task.load_state_dict({name: tensor.to(device) for name, tensor in parts["task"].items()})
        self.task.model.load_state_dict(parts["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(parts["average"])
        self.kept_weights = {name: tensor.to(device) for name, tensor in parts["weights"].items()}
        self.losses = list(parts["epoch"]["losses"].to(device)) if parts["epoch"] else []
        self._load_streams(parts["streams"])
        self._load_progress(progress)
        self._load_optimizer(parts["momentum"])

    def _stream_states(self) -> dict[str, Tensor]:
        states = {name: getattr(self, name).get_state() for name in STREAMS}
        return states | {"shuffle": self.epoch_start}

    def _load_streams(self, states: Mapping[str, Tensor]) -> None:
        for name in STREAMS:
            getattr(self, name).set_state(states[name])
        self.epoch_start = self.shuffle.get_state()

    def _load_progress(self, progress: Progress) -> None:
        self.history = progress.history
        self.kept = self.select_epoch()
        self.passes.forward, self.passes.backward, self.images_learned = progress.work
        self.started -= progress.seconds

    def _load_optimizer(self, momentum: Mapping[str, Tensor]) -> None:
        for number, parameter in enumerate(_parameters(self.optimizer)):
            if f"{number}" in momentum:  # in the parameter's memory layout, as PyTorch itself allocates it
                buffer = torch.empty_like(parameter).copy_(momentum[f"{number}"]).detach()
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        done = len(self.history) * self.job.steps_per_epoch + len(self.losses)
        self.scheduler.load_state_dict(self.scheduler.state_dict() | {"last_epoch": done, "_step_count": done + 1})
        for group, peak in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = peak * self.job.lr_factor(done)


def _averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None  # type: ignore[no-untyped-call]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _momentum_buffers(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}": optimizer.state[parameter]["momentum_buffer"]
        for number, parameter in enumerate(_parameters(optimizer))
        if "momentum_buffer" in optimizer.state[parameter]
    }


def _progress(checkpoint: Checkpoint) -> Progress:
    try:
        return Progress.model_validate(checkpoint.values)
    except ValidationError as error:
        raise UserError(NOT_THIS_RUN) from error


def _validate_tensors(state: TrainerState, tensors: Mapping[str, Tensor], history: list[Row]) -> None:
    """Raises UserError unless exactly the tensors of this run are there, with its types and shapes; the task validates
    its own.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("task/")}
    valid = (
        tensor_specs(found) == tensor_specs(_expected_tensors(state, found, history))
        and all(tensor.isfinite().all() for tensor in found.values())
        and all(is_generator_state(found[f"streams/{name}"]) for name in STREAMS)
        and _is_valid_history(state, history, found.get(LOSSES, torch.zeros(0)).numel())
    )
    if not valid:
        raise UserError(NOT_THIS_RUN)


def _expected_tensors(state: TrainerState, found: Mapping[str, Tensor], history: list[Row]) -> dict[str, Tensor]:
    """Returns tensors with the names, types and shapes that a checkpoint of this run has after such a history."""
    now = {name: tensor for name, tensor in state.checkpoint().tensors.items() if not name.startswith("task/")}
    momentum = flatten({"momentum": {f"{n}": tensor for n, tensor in enumerate(_parameters(state.optimizer))}})
    weights = flatten({"weights": state.model.state_dict()}) if history else {}
    losses = {LOSSES: torch.zeros(found[LOSSES].numel())} if LOSSES in found else {}
    return now | {name: tensor for name, tensor in momentum.items() if name in found} | weights | losses


def _is_valid_history(state: TrainerState, history: list[Row], steps: int) -> bool:
    """Returns whether the rows are those of the first epochs, and the number of steps fits the next epoch."""
    job = state.job
    validated = {"clean", "fgsm", "pgd", job.select_by, *state.task.metric_names}
    columns = {"epoch", "loss"} | (validated if isinstance(job.config, ValidatedTrainingConfig) else set())
    return (
        all(columns <= row.keys() for row in history)
        and [row["epoch"] for row in history] == list(range(1, len(history) + 1))
        and len(history) <= job.config.epochs
        and steps <= (job.steps_per_epoch if len(history) < job.config.epochs else 0)
    )

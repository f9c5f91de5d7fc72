"""The training loop: attack a batch in eval mode, learn from it in train mode, validate after each epoch.

An expert, a baseline and the mixture differ in their `TrainingTask`; the loop is the same.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from advmoe.core import console, files
from advmoe.core.errors import UserError
from advmoe.data.batches import batches
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints.manager import StepCallback, checkpointing
from advmoe.runtime.machine import device
from advmoe.training import validation
from advmoe.training.config import ValidatedTrainingConfig
from advmoe.training.crafting import BatchCrafter
from advmoe.training.flops import SAMPLE_SIZE, FlopsPerImage, measure_flops, training_cost
from advmoe.training.gradients import compute_gradients
from advmoe.training.job import DIGITS, Row, TrainingJob, TrainingResult, TrainingTask
from advmoe.training.job_key import checkpoint_name
from advmoe.training.microbatches import MIN_MICRO_BATCH
from advmoe.training.trainer_state import DivergedError, TrainerState


class Trainer:
    """Runs the steps and epochs of a training job; `state` holds all that changes from step to step."""

    def __init__(self, task: TrainingTask, job: TrainingJob) -> None:
        self.task, self.job, train = task, job, job.dataset["train"]
        task.model.to(device())
        self.images, self.labels = train.images.to(device()), train.labels.to(device())
        min_size = 1 if self._convert_batchnorm() else MIN_MICRO_BATCH  # statistics over all processes need no minimum
        self.state = TrainerState.create(task, job)
        self.crafter = BatchCrafter(task.model, job, self.state, min_size)

    def _convert_batchnorm(self) -> bool:
        """Makes BatchNorm normalise over all processes if the config sets `sync_batchnorm`; returns whether it does."""
        job, config = self.job, self.job.config
        if not (isinstance(config, ValidatedTrainingConfig) and config.sync_batchnorm and distributed.is_distributed()):
            return False
        distributed.convert_sync_batchnorm(self.task.model, job.name, len(job.dataset["train"]) // job.steps_per_epoch)
        return True

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.state.history) == self.job.config.epochs

    def epoch(self, on_step_end: StepCallback) -> None:
        """Trains for one epoch, validates if the config has validation, and keeps the weights of the selected epoch.
        Calls `on_step_end` after each step.
        """
        self._steps(on_step_end)
        self.state.check_finite()
        row = self._history_row()
        self.task.on_epoch_end()
        self.state.losses, self.state.epoch_start = [], self.state.shuffle.get_state()
        self.state.history.append(row)
        self.state.kept = self.state.select_epoch()
        if self.state.kept is row:
            self.state.kept_weights = copy.deepcopy(self.state.model.state_dict())

    def _steps(self, on_step_end: StepCallback) -> None:
        job, state = self.job, self.state
        epoch = batches(self.images, self.labels, job.config.batch_size, job.config.augmentation, state.shuffle)
        title = f"{job.name} epoch {len(state.history) + 1}/{job.config.epochs}"
        for position, (images, labels) in enumerate(console.track(epoch, title, job.steps_per_epoch)):
            if position >= len(state.losses):  # a resumed epoch draws its first batches again, without a step
                state.losses.append(self.step(images, labels))
                on_step_end()

    def _history_row(self) -> Row:
        job, state, number = self.job, self.state, len(self.state.history) + 1
        row: Row = {"epoch": number, "loss": round(float(torch.stack(state.losses).float().mean()), DIGITS)}
        if isinstance(job.config, ValidatedTrainingConfig):
            row |= distributed.run_on_rank0(lambda: validation.validate_epoch(self.task, state.model, job, number))
            console.info(f"{job.name} {validation.summary(row)}")
        return row

    def step(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Runs one optimizer step on a batch; returns its loss, at the weights where the gradients were taken.

        Each of several processes takes some micro-batches, and all have the same state afterwards.
        """
        micro_batches = self.crafter.craft(images_BCHW, labels_B)
        self.task.on_step_start()
        loss = compute_gradients(self.task, micro_batches, self.job.config)
        self.state.images_learned += len(labels_B) * self.job.config.gradients
        self.state.optimizer.step()
        self.state.scheduler.step()
        if self.state.averaged is not None:
            self.state.averaged.update_parameters(self.task.model)
        return loss


def fit(task: TrainingTask, job: TrainingJob) -> TrainingResult:
    """Trains `task.model` in place on the training split; returns it with the weights that `config.selection` keeps.

    Deterministic in the job on a given machine and number of threads, also when killed and resumed. The result of
    several processes differs from that of one by rounding, and by what a BatchNorm normalises together.
    Raises UserError when the loss is no longer finite, and saves the last good weights.
    """
    name = checkpoint_name(job.name, task, job.dataset, job.settings)
    distributed.require_same(job.name, name)
    file = job.checkpoint_dir and job.checkpoint_dir / name
    trainer = Trainer(task, job)
    flops = measure_flops(task, trainer.images[:SAMPLE_SIZE].float() / 255, trainer.labels)
    try:
        with checkpointing(trainer.state, job.name, file) as on_step_end:
            while not trainer.is_finished:
                trainer.epoch(on_step_end)
                on_step_end()
    except DivergedError as error:
        advice = "lower optimizer.lr or set clip"
        raise UserError(f"{error}; {advice}; {_save_kept_weights(trainer.state, file)}") from error
    return _result(trainer.state, flops)


def _save_kept_weights(state: TrainerState, file: Path | None) -> str:
    """Saves the weights of the selected epoch next to the checkpoint; returns a sentence with their path."""
    if not state.kept_weights:
        return "no epoch was finished before"
    weights = f"the last good weights, of epoch {state.kept['epoch']},"
    if file is None:
        return f"{weights} are not kept"
    path = file.with_name(f"{file.stem}-epoch-{state.kept['epoch']}.safetensors")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in state.kept_weights.items()}
    try:
        distributed.run_on_rank0(lambda: files.write_bytes(path, to_safetensors(stored)))
    except UserError as error:
        return f"the last good weights are lost: {error}"
    return f"{weights} are in {path}"


def _result(state: TrainerState, flops: FlopsPerImage) -> TrainingResult:
    model, job = state.task.model, state.job
    model.load_state_dict(state.kept_weights)
    alarms = validation.overfitting_alarms(job, state.kept)
    cost = training_cost(model, flops, state.passes, state.images_learned, job.prior_flops)
    return TrainingResult(model.eval(), state.history, state.kept, alarms, cost, state.seconds)

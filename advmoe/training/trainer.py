"""The training loop: draw an attack, craft in eval mode, learn in train mode, look at the validation split.

An expert, a baseline and the mixture differ in their `Learner`; the loop is the same.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.engine import PassCount
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import MicroBatchDraws
from advmoe.core import console, files
from advmoe.core.errors import UserError
from advmoe.data.batches import batches, batches_per_epoch
from advmoe.data.dataset import Dataset
from advmoe.models import inference
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints.manager import StepCallback, checkpointing
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import derive_seed, device, generator
from advmoe.training import trainer_state
from advmoe.training.batch_attacks import Adversary, CleanBatches, bind, craft, draw
from advmoe.training.config import TrainingConfig, ValidatedTrainingConfig, Validation, lr_factor
from advmoe.training.flops import SAMPLE_SIZE, FlopsPerImage, TrainingCost, measure_flops, training_cost
from advmoe.training.job_key import checkpoint_name
from advmoe.training.microbatches import MIN_SIZE, MicroBatch, average_batchnorm_statistics, split_batch
from advmoe.training.trainer_state import STREAMS
from advmoe.training.weight_perturbation import perturbed_weights

VALIDATION_BATCH = 200
DIGITS = 6  # of the numbers in histories: enough for any accuracy, and equal on equal runs


Row = dict[str, Any]


class TrainingTask(Protocol):
    """What differs between an expert and the mixture."""

    model: nn.Module

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimiser over the model's parameters."""
        ...

    def begin(self) -> None:
        """A step begins: put the model into train mode, or those parts that learn in it."""
        ...

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """The scalar to minimise on one (attacked) batch or a piece of it: a mean over its images."""
        ...

    def after_backward(self) -> None:
        """Look at the gradients of a step before they are clipped and used."""
        ...

    def health(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """Further columns of the history, from validation images clean and attacked."""
        ...

    def epoch_ends(self) -> None:
        """Begin anew whatever is counted by the epoch."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of `health` that every epoch has."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the learner remembers from step to step, beside the model."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Remember what another remembered. Raises UserError, and changes nothing, for what none remembers."""
        ...


@dataclass(frozen=True)
class TrainingJob:
    """One training run: what is learned from, under which attacks, and what `best` means.

    `epsilon`: L-inf radius of PGD batches and of validation; `select_by`: the column of the history to be highest. A
    recipe without validation is not watched: its history holds losses only. `spent`: floating-point operations that
    went into what training starts from; `shelf`: folder of checkpoints.
    """

    name: str
    seed: int
    dataset: Dataset
    recipe: TrainingConfig
    adversary: Adversary
    epsilon: float
    select_by: str
    spent: int = 0
    shelf: Path | None = None

    @property
    def settings(self) -> list[object]:
        """What shapes the run, beside the images."""
        return [self.seed, self.recipe, self.adversary, self.epsilon, self.select_by, self.spent]


@dataclass
class TrainingResult:
    """The outcome: the model that was kept, one row per epoch, the row of the kept epoch, its alarms and its cost."""

    model: nn.Module
    history: list[Row]
    kept: Row
    alarms: list[str]
    cost: TrainingCost
    seconds: float = field(compare=False)


class DivergedError(UserError):
    """The loss, the weights or the answers are no longer finite numbers."""


class Trainer:
    """The moving parts of a training run, all that changes from step to step."""

    def __init__(self, learner: TrainingTask, course: TrainingJob) -> None:
        self.learner = learner
        self.course = course
        self.started = time.monotonic()
        place, recipe, train = device(), course.recipe, course.dataset["train"]
        learner.model.to(place)
        self.images, self.labels = train.images.to(place), train.labels.to(place)
        self.steps_per_epoch = batches_per_epoch(len(train), recipe.batch_size)
        self.smallest = MIN_SIZE  # piece of a batch
        if isinstance(recipe, ValidatedTrainingConfig) and recipe.sync_batchnorm and distributed.is_distributed():
            distributed.convert_sync_batchnorm(learner.model, course.name, len(train) // self.steps_per_epoch)
            self.smallest = 1  # what is normalised together is larger
        self.optimizer = learner.optimizer()
        steps = recipe.epochs * self.steps_per_epoch
        self.rate: Callable[[int], float] = lambda step: lr_factor(recipe.schedule, step, steps)
        self.scheduler = LambdaLR(self.optimizer, self.rate)
        self.average = _averaged(learner.model, recipe.ema)
        self.passes, self.learned = PassCount(), 0
        # a stream for each purpose: an attack with more restarts must not change the order of the images
        self.shuffle, self.adversary, self.noise = (generator(course.seed, course.name, purpose) for purpose in STREAMS)
        self.losses: list[Tensor] = []  # of the steps of this epoch
        self.epoch_began = self.shuffle.get_state()
        self.history: list[Row] = []
        self.kept: Row = {}
        self.weights: Mapping[str, Tensor] = {}

    @property
    def model(self) -> nn.Module:
        """The weights that would be kept now: the averaged ones where there are any."""
        return self.learner.model if self.average is None else self.average.module

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) == self.course.recipe.epochs

    def epoch(self, look: StepCallback) -> None:
        """Go once through the training split, then look at the validation split if the recipe has one; keep the weights
        if they are the ones to keep. `look` is called after every step.
        """
        course, recipe, number = self.course, self.course.recipe, len(self.history) + 1
        epoch = batches(self.images, self.labels, recipe.batch_size, recipe.augmentation, self.shuffle)
        what = f"{course.name} epoch {number}/{recipe.epochs}"
        for position, (images, labels) in enumerate(console.track(epoch, what, self.steps_per_epoch)):
            if position >= len(self.losses):  # else it was learned from before a kill, and is only drawn again
                self.losses.append(self.step(images, labels))
                look()
        self.check()
        row: Row = {"epoch": number, "loss": round(float(torch.stack(self.losses).float().mean()), DIGITS)}
        if isinstance(recipe, ValidatedTrainingConfig):
            row |= distributed.run_on_rank0(lambda: _watch(self.learner, self.model, course, number))
            console.say(f"{course.name} {_summary(row)}")
        self.learner.epoch_ends()
        self.losses, self.epoch_began = [], self.shuffle.get_state()
        self.history.append(row)
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self.kept = self.best()
        if self.kept is row:
            self.weights = copy.deepcopy(self.model.state_dict())

    def best(self) -> Row:
        """The row of the epoch to keep: the first of the best, or the last."""
        recipe = self.course.recipe
        if isinstance(recipe, ValidatedTrainingConfig) and recipe.selection == "best":
            return max(self.history, key=lambda row: row[self.course.select_by], default={})
        return self.history[-1] if self.history else {}

    def check(self) -> None:
        """Raises UserError, naming the batch, when the loss or the weights of this epoch are no longer finite."""
        where = f"in epoch {len(self.history) + 1}, batch"
        finite = torch.stack(self.losses).isfinite() if self.losses else torch.ones(1)
        if not finite.all():
            raise DivergedError(
                f"{self.course.name}: the loss became NaN or infinite {where} {int(finite.int().argmin()) + 1}"
            )
        if not all(tensor.isfinite().all() for tensor in self.learner.model.state_dict().values()):
            raise DivergedError(f"{self.course.name}: the weights became NaN or infinite {where} {len(self.losses)}")

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Attack one batch as drawn, learn from it; returns its loss, where gradients were taken.

        Of several processes each takes some pieces of the batch, and all are in the same state afterwards.
        """
        model, recipe = self.learner.model, self.course.recipe
        pieces = self._crafted(images, labels)
        self.learner.begin()
        loss = self._learned(pieces, len(labels))
        if isinstance(recipe, ValidatedTrainingConfig) and recipe.awp:
            with perturbed_weights(model, recipe.awp):
                loss = self._learned(pieces, len(labels))
        self.learner.after_backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(model)
        return loss

    def _crafted(self, images: Tensor, labels: Tensor) -> list[MicroBatch]:
        """The batch under one drawn attack, piece by piece, against the network as it is before the step."""
        course, pieces = self.course, []
        drawn, began, passes = (
            draw(course.adversary, course.epsilon, self.adversary),
            self.noise.get_state(),
            PassCount(),
        )
        for part in self._parts(len(labels)):
            rows = part.to(labels.device)
            clean, truth = images[rows], labels[rows]
            attacked = clean
            if drawn is not None:
                self.noise.set_state(began)  # every piece sees the draws of the whole batch, and takes its own
                draws = MicroBatchDraws(self.noise, len(labels), part)
                attacked = craft(self.learner.model, clean, truth, drawn, draws, course.recipe.precision, passes)
            pieces.append(MicroBatch(clean, attacked, truth, len(truth) / len(labels)))
        if distributed.is_distributed():  # who had no image may not have drawn; the first process always has one
            self.noise.set_state(distributed.run_on_rank0(self.noise.get_state))
        done = distributed.all_reduce_sum(torch.tensor([passes.forward, passes.backward])).tolist()
        self.passes.forward, self.passes.backward = self.passes.forward + done[0], self.passes.backward + done[1]
        return [piece for piece in pieces if len(piece.labels)]

    def _parts(self, count: int) -> Sequence[Tensor]:
        """The pieces of this process; without one it attacks no image, and adds up zeros with the others."""
        pieces = split_batch(count, self.course.recipe.micro_batch, distributed.world_size(), self.smallest)
        return distributed.shard(pieces) or [torch.arange(0)]

    def _learned(self, pieces: list[MicroBatch], count: int) -> Tensor:
        """Take the gradients of a batch of so many images, with all processes; returns its loss."""
        self.learned += count
        self.optimizer.zero_grad(set_to_none=True)
        loss = distributed.all_reduce_sum(self._gradients(pieces))
        distributed.all_reduce_gradients(self.learner.model)
        return loss

    def _gradients(self, pieces: list[MicroBatch]) -> Tensor:
        """Of the loss of this process's pieces, which is returned; left where the optimiser looks for them."""
        model = self.learner.model
        total = next(model.parameters()).new_zeros(())
        for piece in average_batchnorm_statistics(model, pieces):
            images, clean = (
                found.contiguous(memory_format=torch.channels_last) for found in (piece.images, piece.clean)
            )
            with inference.autocast(images.device, self.course.recipe.precision):
                loss = piece.share * self.learner.loss(images, piece.labels, clean)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    # ---- to be killed and go on, to the last bit the same

    @property
    def position(self) -> tuple[int, int]:
        """Whole epochs done, and steps of the next one."""
        return len(self.history), len(self.losses)

    @property
    def progress(self) -> str:
        """The same in words."""
        return f"{len(self.history)} epochs and {len(self.losses)} steps"

    @property
    def seconds(self) -> float:
        """Spent on this run, before kills too."""
        return time.monotonic() - self.started

    def state(self) -> Checkpoint:
        """All that changes from step to step. Raises UserError when the loss or the weights are no longer finite."""
        return trainer_state.trainer_checkpoint(self)

    def restore(self, snapshot: Checkpoint) -> None:
        """Be as at that moment. Raises UserError, and changes nothing, for what is no state of this run."""
        trainer_state.load_trainer_checkpoint(self, snapshot)


def fit(learner: TrainingTask, course: TrainingJob) -> TrainingResult:
    """Train `learner.model` in place on the training split; returns the model that `recipe.selection` keeps.

    Deterministic in the course on a given machine and number of threads, however often it was killed in between. What
    several processes find differs from what one finds by rounding, and by what a BatchNorm normalises together.
    Raises UserError when the loss is no longer finite, and keeps the last good weights.
    """
    work = checkpoint_name(course.name, learner, course.dataset, course.settings)
    distributed.require_same(course.name, work)
    file = course.shelf and course.shelf / work
    run = Trainer(learner, course)
    each = measure_flops(learner, run.images[:SAMPLE_SIZE].float() / 255, run.labels)
    try:
        with checkpointing(run, course.name, file) as look:
            while not run.is_over:
                run.epoch(look)
                look()
    except DivergedError as error:
        raise UserError(f"{error}; lower optimizer.lr or set clip; {_last_good(run, file)}") from error
    return _outcome(run, each)


def _last_good(run: Trainer, file: Path | None) -> str:
    """Keep the weights of the best finished epoch, all of which were finite, where somebody can look at them."""
    if not run.weights:
        return "no epoch was finished before"
    if file is None:
        return f"the last good weights, of epoch {run.kept['epoch']}, are not kept"
    good = file.with_name(f"{file.stem}-epoch-{run.kept['epoch']}.safetensors")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in run.weights.items()}
    try:
        distributed.run_on_rank0(lambda: files.write_bytes(good, to_safetensors(stored)))
    except UserError as error:
        return f"the last good weights are lost: {error}"
    return f"the last good weights, of epoch {run.kept['epoch']}, are in {good}"


def _outcome(run: Trainer, each: FlopsPerImage) -> TrainingResult:
    course, model = run.course, run.learner.model
    model.load_state_dict(run.weights)
    alarms = (
        _overfitting(course, course.recipe.validation, run.kept)
        if isinstance(course.recipe, ValidatedTrainingConfig)
        else []
    )
    worth = training_cost(model, each, run.passes, run.learned, course.spent)
    return TrainingResult(model.eval(), run.history, run.kept, alarms, worth, run.seconds)


def _watch(learner: TrainingTask, model: nn.Module, course: TrainingJob, epoch: int) -> Row:
    measured, clean, attacked = validate(model, course)
    if not torch.isfinite(inference.predict(model, clean, VALIDATION_BATCH)).all():
        raise DivergedError(f"{course.name}: the network outputs NaN or infinity after epoch {epoch}")
    return {**measured, **learner.health(model, clean, attacked)}


def validate(model: nn.Module, course: TrainingJob) -> tuple[Row, Tensor, Tensor]:
    """Clean, FGSM and PGD accuracy on the validation images, and these clean and under PGD (N, C, H, W)."""
    assert isinstance(course.recipe, ValidatedTrainingConfig)
    place, validation = device(), course.recipe.validation
    split, ball = course.dataset["validation"].first(validation.images), LInf(course.epsilon)
    images, labels = split.pixels().to(place), split.labels.to(place)
    clean = inference.predict(model, images, VALIDATION_BATCH).argmax(1) == labels
    row: Row = {"clean": _share(clean)}
    adversarial = images
    for attack in (Fgsm(kind="fgsm"), _validation_pgd(validation)):
        adversarial = engine.attack_dataset(
            model,
            images,
            labels,
            clean,
            bind(attack),
            ball=ball,
            seed=derive_seed(course.seed, course.name, "validation"),
            purpose=attack.kind,
            precision=course.recipe.precision,
            batch_size=VALIDATION_BATCH,
        )
        robust = clean & (inference.predict(model, adversarial, VALIDATION_BATCH).argmax(1) == labels)
        row[attack.kind] = _share(robust)
    return row, images, adversarial


def _validation_pgd(validation: Validation) -> Pgd:
    return Pgd(kind="pgd", steps=validation.steps, step_size=validation.step_size, restarts=1, loss="ce", targets=0)


def _averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None  # type: ignore[no-untyped-call]


def _overfitting(course: TrainingJob, validation: Validation, row: Row) -> list[str]:
    """The alarm for catastrophic overfitting: robust to one step, not to several (Wong et al. 2020)."""
    gap = row["fgsm"] - row["pgd"]
    if gap <= validation.gap or isinstance(course.adversary, CleanBatches):
        return []  # a benign network loses to more steps too, but nobody took it for robust
    return [
        f"{course.name}: FGSM accuracy {row['fgsm']:.3f} but PGD accuracy {row['pgd']:.3f} on validation: "
        "overfitted to one-step attacks"
    ]


def _share(correct: Tensor) -> float:
    return round(float(correct.float().mean()), DIGITS)


def _summary(row: Row) -> str:
    return (
        f"epoch {row['epoch']}: loss {row['loss']:.3f}, validation clean {row['clean']:.3f}, "
        f"FGSM {row['fgsm']:.3f}, PGD {row['pgd']:.3f}"
    )

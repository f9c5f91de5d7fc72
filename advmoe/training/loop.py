"""The training loop: draw an attack, craft in eval mode, learn in train mode, look at the validation split.

An expert, a baseline and the mixture differ in their `Learner`; the loop is the same.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advmoe import console, engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.draws import BatchDraws
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd
from advmoe.data.batches import batches, batches_per_epoch
from advmoe.data.dataset import Dataset
from advmoe.engine import Passes
from advmoe.errors import UserError
from advmoe.machine import derive_seed, device, generator
from advmoe.training.adversary import CleanBatches, SingleAdversary, bind, craft, draw
from advmoe.training.cost import SAMPLE, Cost, cost, rates
from advmoe.training.recipe import Learning, Recipe, Validation, rate

VALIDATION_BATCH = 200
DIGITS = 6  # of the numbers in histories: enough for any accuracy, and equal on equal runs

Row = dict[str, Any]


class Learner(Protocol):
    """What differs between an expert and the mixture."""

    model: nn.Module

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimiser over the model's parameters."""
        ...

    def begin(self, clean_BCHW: Tensor) -> None:
        """A step begins: put the model into train mode, or those parts that learn in it; look at the clean images."""
        ...

    def loss(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """The scalar to minimise on one (attacked) batch."""
        ...

    def after_backward(self) -> None:
        """Look at the gradients of a step before they are clipped and used."""
        ...

    def health(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """Further columns of the history, from validation images clean and attacked; the epoch ends here."""
        ...


@dataclass(frozen=True)
class Course:
    """One training run: what is learned from, under which attacks, and what `best` means.

    `epsilon`: L-inf radius of PGD batches and of validation; `select_by`: the column of the history to be highest. A
    recipe without validation is not watched: its history holds losses only. `spent`: floating-point operations that
    went into what training starts from.
    """

    name: str
    seed: int
    dataset: Dataset
    recipe: Learning
    adversary: SingleAdversary
    epsilon: float
    select_by: str
    spent: int = 0


@dataclass
class Trained:
    """The outcome: the model that was kept, one row per epoch, the row of the kept epoch, its alarms and its cost."""

    model: nn.Module
    history: list[Row]
    kept: Row
    alarms: list[str]
    cost: Cost
    seconds: float = field(compare=False)


class Run:
    """The moving parts of a training run, all that changes from step to step."""

    def __init__(self, learner: Learner, course: Course) -> None:
        self.learner = learner
        self.course = course
        place, recipe, train = device(), course.recipe, course.dataset["train"]
        learner.model.to(place)
        self.images, self.labels = train.images.to(place), train.labels.to(place)
        self.steps_per_epoch = batches_per_epoch(len(train), recipe.batch_size)
        self.optimizer = learner.optimizer()
        steps = recipe.epochs * self.steps_per_epoch
        self.scheduler = LambdaLR(self.optimizer, lambda step: rate(recipe.schedule, step, steps))
        self.average = _averaged(learner.model, recipe.ema)
        self.passes, self.learned = Passes(), 0
        # a stream for each purpose: an attack with more restarts must not change the order of the images
        self.shuffle, self.adversary, self.noise = (
            generator(course.seed, course.name, purpose) for purpose in ("shuffle", "adversary", "noise")
        )

    @property
    def model(self) -> nn.Module:
        """The weights that would be kept now: the averaged ones where there are any."""
        return self.learner.model if self.average is None else self.average.module

    def epoch(self, number: int) -> Row:
        """Go once through the training split, then look at the validation split if the recipe has one."""
        recipe = self.course.recipe
        epoch = batches(self.images, self.labels, recipe.batch_size, recipe.augmentation, self.shuffle)
        what = f"{self.course.name} epoch {number}/{recipe.epochs}"
        losses = [self.step(images, labels) for images, labels in console.track(epoch, what, self.steps_per_epoch)]
        row = {"epoch": number, "loss": _mean(losses, self.course.name, number)}
        return row | _watch(self.learner, self.model, self.course, number) if isinstance(recipe, Recipe) else row

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Attack one batch as drawn, learn from it; returns its loss."""
        course, model = self.course, self.learner.model
        recipe = course.recipe
        drawn, clean = draw(course.adversary, course.epsilon, self.adversary), images
        if drawn is not None:
            images = craft(model, images, labels, drawn, BatchDraws(self.noise), recipe.precision, self.passes)
        self.learner.begin(clean.contiguous(memory_format=torch.channels_last))
        self.learned += len(labels)
        self.optimizer.zero_grad(set_to_none=True)
        with engine.autocast(images.device, recipe.precision):
            loss = self.learner.loss(images.contiguous(memory_format=torch.channels_last), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.learner.after_backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(model)
        return loss.detach()


def fit(learner: Learner, course: Course) -> Trained:
    """Train `learner.model` in place on the training split; returns the model that `recipe.selection` keeps.

    Deterministic in the course on a given machine and number of threads. Raises UserError when the loss is no longer
    finite.
    """
    started = time.monotonic()
    run, recipe = Run(learner, course), course.recipe
    each = rates(learner, run.images[:SAMPLE].float() / 255, run.labels)
    history: list[Row] = []
    kept: Row = {}
    weights: Mapping[str, Tensor] = {}
    for number in range(1, recipe.epochs + 1):
        history.append(run.epoch(number))
        if isinstance(recipe, Recipe):
            console.say(f"{course.name} {_summary(history[-1])}")
            if recipe.selection == "best" and kept and history[-1][course.select_by] <= kept[course.select_by]:
                continue
        kept, weights = history[-1], copy.deepcopy(run.model.state_dict())
    learner.model.load_state_dict(weights)
    alarms = _overfitting(course, recipe.validation, kept) if isinstance(recipe, Recipe) else []
    worth = cost(learner.model, each, run.passes, run.learned, course.spent)
    return Trained(learner.model.eval(), history, kept, alarms, worth, time.monotonic() - started)


def _mean(losses: list[Tensor], name: str, epoch: int) -> float:
    loss = torch.stack(losses).float()
    if not torch.isfinite(loss).all():
        batch = int((~torch.isfinite(loss)).nonzero()[0]) + 1
        raise UserError(
            f"{name}: the loss became NaN or infinite in epoch {epoch}, batch {batch}; lower optimizer.lr or set clip"
        )
    return round(float(loss.mean()), DIGITS)


def _watch(learner: Learner, model: nn.Module, course: Course, epoch: int) -> Row:
    measured, clean, attacked = validate(model, course)
    if not torch.isfinite(engine.predict(model, clean, VALIDATION_BATCH)).all():
        raise UserError(
            f"{course.name}: the network outputs NaN or infinity after epoch {epoch}; lower optimizer.lr or set clip"
        )
    return {**measured, **learner.health(model, clean, attacked)}


def validate(model: nn.Module, course: Course) -> tuple[Row, Tensor, Tensor]:
    """Clean, FGSM and PGD accuracy on the validation images, and these clean and under PGD (N, C, H, W)."""
    assert isinstance(course.recipe, Recipe)
    place, validation = device(), course.recipe.validation
    split, ball = course.dataset["validation"].first(validation.images), LInf(course.epsilon)
    images, labels = split.pixels().to(place), split.labels.to(place)
    clean = engine.predict(model, images, VALIDATION_BATCH).argmax(1) == labels
    row: Row = {"clean": _share(clean)}
    adversarial = images
    for attack in (Fgsm(kind="fgsm"), _validation_pgd(validation)):
        adversarial = engine.strike_all(
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
        robust = clean & (engine.predict(model, adversarial, VALIDATION_BATCH).argmax(1) == labels)
        row[attack.kind] = _share(robust)
    return row, images, adversarial


def _validation_pgd(validation: Validation) -> Pgd:
    return Pgd(kind="pgd", steps=validation.steps, step_size=validation.step_size, restarts=1, loss="ce", targets=0)


def _averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None  # type: ignore[no-untyped-call]


def _overfitting(course: Course, validation: Validation, row: Row) -> list[str]:
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

"""The training loop: draw an attack, craft in eval mode, learn in train mode, look at the validation split.

An expert, a baseline and the mixture differ in their `Learner`; the loop is the same.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
from advmoe.state import Snapshot
from advmoe.training.adversary import CleanBatches, SingleAdversary, bind, craft, draw
from advmoe.training.cost import SAMPLE, Cost, Rates, cost, rates
from advmoe.training.keeper import Look, identity, kept
from advmoe.training.recipe import Learning, Recipe, Validation, rate

VALIDATION_BATCH = 200
DIGITS = 6  # of the numbers in histories: enough for any accuracy, and equal on equal runs

STREAMS = ("shuffle", "adversary", "noise")  # of random numbers

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

    def state(self) -> dict[str, Tensor]:
        """What the learner remembers from step to step, beside the model."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Remember what another remembered."""
        ...


@dataclass(frozen=True)
class Course:
    """One training run: what is learned from, under which attacks, and what `best` means.

    `epsilon`: L-inf radius of PGD batches and of validation; `select_by`: the column of the history to be highest. A
    recipe without validation is not watched: its history holds losses only. `spent`: floating-point operations that
    went into what training starts from; `shelf`: a folder to keep the state in, see `advmoe.state`.
    """

    name: str
    seed: int
    dataset: Dataset
    recipe: Learning
    adversary: SingleAdversary
    epsilon: float
    select_by: str
    spent: int = 0
    shelf: Path | None = None

    @property
    def settings(self) -> list[object]:
        """What shapes the run, beside the images."""
        return [self.seed, self.recipe, self.adversary, self.epsilon, self.select_by, self.spent]


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
        self.started = time.monotonic()
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

    def epoch(self, look: Look) -> None:
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
        row: Row = {"epoch": number, "loss": _mean(self.losses, course.name, number)}
        if isinstance(recipe, Recipe):
            row |= _watch(self.learner, self.model, course, number)
            console.say(f"{course.name} {_summary(row)}")
        self.losses, self.epoch_began = [], self.shuffle.get_state()
        self.history.append(row)
        self._keep(row)

    def _keep(self, row: Row) -> None:
        recipe, column = self.course.recipe, self.course.select_by
        best = isinstance(recipe, Recipe) and recipe.selection == "best"
        if not best or not self.kept or row[column] > self.kept[column]:
            self.kept, self.weights = row, copy.deepcopy(self.model.state_dict())

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

    # ---- to be killed and go on, to the last bit the same

    @property
    def position(self) -> tuple[int, int]:
        """Whole epochs done, and steps of the next one."""
        return len(self.history), len(self.losses)

    @property
    def seconds(self) -> float:
        """Spent on this run, before kills too."""
        return time.monotonic() - self.started

    def state(self) -> Snapshot:
        """All of it. Of the order of images only where the epoch's draws began: they are drawn again from there."""
        momenta = {
            f"{number}": self.optimizer.state[parameter]["momentum_buffer"]
            for number, parameter in enumerate(self._parameters())
            if "momentum_buffer" in self.optimizer.state[parameter]
        }
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.learner.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "momentum": momenta,
            "weights": self.weights,
            "learner": self.learner.state(),
            "streams": {name: getattr(self, name).get_state() for name in STREAMS} | {"shuffle": self.epoch_began},
            "epoch": {"losses": torch.stack(self.losses)} if self.losses else {},
        }
        values = {
            "schedule": self.scheduler.state_dict(),
            "history": self.history,
            "kept": self.kept,
            "work": [self.passes.forward, self.passes.backward, self.learned],
            "seconds": self.seconds,
        }
        return Snapshot(
            {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}, values
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Be as at that moment."""
        place, values = self.images.device, snapshot.values
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in snapshot.tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        self.learner.model.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        self._restore_optimizer(parts["momentum"], values["schedule"])
        self.weights = {name: tensor.to(place) for name, tensor in parts["weights"].items()}
        self.learner.restore({name: tensor.to(place) for name, tensor in parts["learner"].items()})
        for name in STREAMS:
            getattr(self, name).set_state(parts["streams"][name])
        self.epoch_began = self.shuffle.get_state()
        self.losses = list(parts["epoch"]["losses"].to(place)) if parts["epoch"] else []
        self.history, self.kept = values["history"], values["kept"]
        self.passes.forward, self.passes.backward, self.learned = values["work"]
        self.started -= values["seconds"]

    def _restore_optimizer(self, momenta: Mapping[str, Tensor], schedule: dict[str, Any]) -> None:
        for number, parameter in enumerate(self._parameters()):
            if f"{number}" in momenta:  # laid out in memory as the parameter is, as PyTorch itself does
                buffer = torch.empty_like(parameter).copy_(momenta[f"{number}"]).detach()
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.scheduler.load_state_dict(schedule)
        for group, rate_now in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate_now

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def fit(learner: Learner, course: Course) -> Trained:
    """Train `learner.model` in place on the training split; returns the model that `recipe.selection` keeps.

    Deterministic in the course on a given machine and number of threads, however often it was killed in between.
    Raises UserError when the loss is no longer finite.
    """
    file = course.shelf and course.shelf / identity(course.name, learner, course.dataset, course.settings)
    run = Run(learner, course)
    each = rates(learner, run.images[:SAMPLE].float() / 255, run.labels)
    with kept(run, course.name, file) as look:
        while not run.is_over:
            run.epoch(look)
            look()
    return _outcome(run, each)


def _outcome(run: Run, each: Rates) -> Trained:
    course, model = run.course, run.learner.model
    model.load_state_dict(run.weights)
    alarms = _overfitting(course, course.recipe.validation, run.kept) if isinstance(course.recipe, Recipe) else []
    worth = cost(model, each, run.passes, run.learned, course.spent)
    return Trained(model.eval(), run.history, run.kept, alarms, worth, run.seconds)


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

"""APGD: projected gradient ascent with an adaptive step size (Croce & Hein 2020, arXiv 2003.01690).

Algorithm 1 of the paper. Where paper and authors' code differ, the code is followed, because the published numbers come
from it: a step size is halved at a share of *at most* rho increases, and the first point after a return to the best one
is compared with the point before the return. The ball provides projection and steepest direction of each norm.

Shapes: B batch, b images still under attack, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import TINY, Ball, RandomStream
from advmoe.attacks.interface import (
    IsAdversarial,
    Model,
    confirm_adversarial,
    cross_entropy,
    margin,
    pixel_gradient,
    target_margin,
)
from advmoe.attacks.pgd import top_wrong_classes
from advmoe.core.settings import PositiveInt, Settings

FIRST_STEP = 2.0  # in units of epsilon: the ball's diameter
STEP_WEIGHT = 0.75  # weight of the new step (the paper's alpha); the rest is momentum, the previous change
RHO = 0.75  # the step size is halved if at most this share of steps since the last checkpoint raised the loss
FIRST_GAP, MIN_GAP, GAP_DECREMENT = 22, 6, 3  # intervals between checkpoints, in percent of the steps

# (logits (b, K), rows (b,) of the batch they belong to) -> loss to maximise (b,)
Objective = Callable[[Tensor, Tensor], Tensor]


class ApgdCe(Settings):
    """`steps` also determines the checkpoints, which are shares of it; the step size is adaptive."""

    kind: Literal["apgd-ce"]
    steps: PositiveInt
    restarts: PositiveInt


class ApgdT(Settings):
    """`targets`: number of most likely wrong classes to target in turn, each with all restarts; at most classes - 1."""

    kind: Literal["apgd-t"]
    steps: PositiveInt
    targets: PositiveInt
    restarts: PositiveInt


def apgd_ce(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: ApgdCe,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Maximises the cross-entropy of the true class.

    An image leaves at its first point that the model misclassifies and `is_adversarial`, if given, confirms; without
    such a point, the point of the highest loss is returned.
    """
    search = _ApgdSearch(model, images_BCHW, labels_B, ball, is_adversarial, settings.steps)
    for _ in range(settings.restarts):
        search.ascend(lambda logits, rows: cross_entropy(logits, labels_B[rows]), draws)
    return search.result


def apgd_t(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: ApgdT,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Maximises the targeted DLR loss for one wrong class after another; returns points as `apgd_ce` does.

    With fewer than four classes the targeted DLR is undefined, and the logit difference to the target is used.
    """
    search = _ApgdSearch(model, images_BCHW, labels_B, ball, is_adversarial, settings.steps)
    for targets_B in top_wrong_classes(model, images_BCHW, labels_B, settings.targets):
        for _ in range(settings.restarts):
            search.ascend(_targeted_objective(labels_B, targets_B), draws)
    return search.result


def _targeted_objective(labels_B: Tensor, targets_B: Tensor) -> Objective:
    def objective(logits: Tensor, rows: Tensor) -> Tensor:
        loss = targeted_dlr if logits.shape[1] >= 4 else target_margin
        return loss(logits, labels_B[rows], targets_B[rows])

    return objective


def dlr(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Difference of logits ratio (B,), max over i != y of z_i - z_y, over z_(1) - z_(3) (section 4.2 of the paper).

    Above 0 where the image is misclassified; invariant to the scale of the logits. Needs three classes. Where the true
    class ranks third it is constantly 1: the gradient is 0 there, which does not indicate gradient masking.
    """
    ranked = logits_BK.topk(3, dim=1).values
    return margin(logits_BK, labels_B) / (ranked[:, 0] - ranked[:, 2]).clamp_min(TINY)


def targeted_dlr(logits_BK: Tensor, labels_B: Tensor, targets_B: Tensor) -> Tensor:
    """Targeted DLR (B,), z_t - z_y over z_(1) - (z_(3) + z_(4)) / 2 (section 4.2 of the paper).

    Unlike `dlr` never constant. Above 0 where the target logit exceeds the true one. Needs four classes. Finite also
    where the four best logits tie, which is common in bfloat16.
    """
    ranked = logits_BK.topk(4, dim=1).values
    spread = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2
    return target_margin(logits_BK, labels_B, targets_B) / spread.clamp_min(TINY)


def step_size_checkpoints(steps: int) -> dict[int, int]:
    """Returns the steps after which step sizes are adapted, each with the number of steps since the previous one."""
    gap, least, shrink = (max(percent * steps // 100, 1) for percent in (FIRST_GAP, MIN_GAP, GAP_DECREMENT))
    checkpoints, done = {}, gap
    while done <= steps:
        checkpoints[done] = gap
        gap = max(gap - shrink, least)
        done += gap
    return checkpoints


@dataclass
class _ApgdState:
    """State of one ascent. Every field has one row per image still under attack."""

    rows: Tensor  # of the batch
    images: Tensor
    labels: Tensor
    points: Tensor
    previous: Tensor  # the points one step before
    gradient: Tensor
    loss: Tensor
    best_points: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor  # in units of epsilon
    increases: Tensor  # steps since the last checkpoint that raised the loss
    best_loss_at_checkpoint: Tensor
    halved: Tensor  # whether the last checkpoint halved the step size

    @classmethod
    def begin(cls, rows: Tensor, images: Tensor, labels: Tensor, points: Tensor) -> "_ApgdState":
        """Starts at `points`. The first evaluation is not counted as an increase (loss +inf) but as the best (-inf)."""
        infinity = points.new_full(rows.shape, torch.inf)
        return cls(
            rows=rows,
            images=images,
            labels=labels,
            points=points,
            previous=points,
            gradient=points,
            loss=infinity,
            best_points=points,
            best_gradient=points,
            best_loss=-infinity,
            step_size=torch.full_like(infinity, FIRST_STEP),
            increases=torch.zeros_like(rows),
            best_loss_at_checkpoint=-infinity,
            halved=torch.zeros_like(rows, dtype=torch.bool),
        )

    def select(self, mask: Tensor) -> "_ApgdState":
        return _ApgdState(**{name: part[mask] for name, part in vars(self).items()})

    def step(self, ball: Ball, step_weight: float) -> None:
        """One gradient step with momentum: `step_weight` of the new step, the rest of the previous change."""
        length = _broadcast(self.step_size) * ball.epsilon
        target = ball.project(self.points + length * ball.steepest(self.gradient), self.images)
        moved = self.points + step_weight * (target - self.points) + (1 - step_weight) * (self.points - self.previous)
        self.previous, self.points = self.points, ball.project(moved, self.images)

    def evaluate(self, model: Model, objective: Objective) -> Tensor:
        """Updates loss and gradient at the current points; returns which points the model misclassifies (b,)."""
        self.gradient, logits = pixel_gradient(model, self.points, lambda output: objective(output, self.rows))
        loss = objective(logits, self.rows)
        self.increases += loss > self.loss
        better = loss > self.best_loss
        self.loss, self.best_loss = loss, torch.where(better, loss, self.best_loss)
        self.best_points = torch.where(_broadcast(better), self.points, self.best_points)
        self.best_gradient = torch.where(_broadcast(better), self.gradient, self.best_gradient)
        return logits.argmax(dim=1) != self.labels

    def adapt_step_size(self, gap: int) -> None:
        """At a checkpoint: halves step sizes that led to too little progress, and returns to the best points there."""
        stuck = ~self.halved & (self.best_loss <= self.best_loss_at_checkpoint)
        halve = (self.increases <= RHO * gap) | stuck
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        self.points = torch.where(_broadcast(halve), self.best_points, self.points)
        self.gradient = torch.where(_broadcast(halve), self.best_gradient, self.gradient)
        self.halved, self.best_loss_at_checkpoint, self.increases = (
            halve,
            self.best_loss,
            torch.zeros_like(self.increases),
        )


@dataclass
class _ApgdSearch:
    """The best point of each image of a batch, and which images are still under attack; each ascent runs on those."""

    model: Model
    images: Tensor
    labels: Tensor
    ball: Ball
    is_adversarial: IsAdversarial | None
    steps: int
    result: Tensor = field(init=False)
    best_loss: Tensor = field(init=False)  # (B,) over all ascents so far
    active: Tensor = field(init=False)  # rows (b,) of the images still under attack

    def __post_init__(self) -> None:
        self.result = self.images.clone()
        self.best_loss = self.images.new_full(self.labels.shape, -torch.inf)
        self.active = torch.arange(len(self.images), device=self.images.device)

    def ascend(self, objective: Objective, draws: RandomStream) -> None:
        """Runs all steps of one ascent from a random start, for the images still under attack."""
        if not len(self.active):
            return
        state = self._begin(draws.pick(self.active))
        state = self._drop_adversarial(state, state.evaluate(self.model, objective))
        intervals = step_size_checkpoints(self.steps)
        for step in range(1, self.steps + 1):
            if not len(state.rows):
                break
            state.step(self.ball, STEP_WEIGHT if step > 1 else 1.0)
            state = self._drop_adversarial(state, state.evaluate(self.model, objective))
            if step in intervals:
                state.adapt_step_size(intervals[step])
        self._finish(state)

    def _begin(self, draws: RandomStream) -> _ApgdState:
        images = self.images[self.active]
        return _ApgdState.begin(self.active, images, self.labels[self.active], random_start(self.ball, images, draws))

    def _drop_adversarial(self, state: _ApgdState, wrong: Tensor) -> _ApgdState:
        """Stores the points that are confirmed to be adversarial and removes their images from the state."""
        adversarial = confirm_adversarial(wrong, state.points, state.labels, self.is_adversarial)
        if not adversarial.any():
            return state
        self.result[state.rows[adversarial]] = state.points[adversarial]
        return state.select(~adversarial)

    def _finish(self, state: _ApgdState) -> None:
        """Stores the best points where they improve on earlier ascents; the images stay under attack."""
        better = state.best_loss > self.best_loss[state.rows]
        rows = state.rows[better]
        self.result[rows], self.best_loss[rows] = state.best_points[better], state.best_loss[better]
        self.active = state.rows


def random_start(ball: Ball, images_BCHW: Tensor, draws: RandomStream) -> Tensor:
    """Returns a random start as in the authors' code: noise scaled to norm epsilon, projected into the box."""
    if ball.norm == "linf":
        noise = draws.uniform(images_BCHW)
        direction = noise / noise.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(TINY)
    else:
        direction = ball.steepest(draws.normal(images_BCHW))
    return ball.project(images_BCHW + ball.epsilon * direction, images_BCHW)


def _broadcast(numbers_B: Tensor) -> Tensor:
    return numbers_B.view(-1, 1, 1, 1)

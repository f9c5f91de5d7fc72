"""APGD: projected gradient ascent that sets its own step size (Croce & Hein 2020, arXiv 2003.01690).

Algorithm 1 of the paper; where paper and authors' code differ in a detail, the code is followed, because the published
numbers come from it: a step size halves at *at most* rho rises, and the first point after a return to the best one is
compared with the point that was left. Both norms share one ascent: the ball supplies projection and steepest direction.

Shapes: B batch, b images still open, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import TINY, Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Model, confirmed, cross_entropy, lead, margin, pixel_gradient
from advmoe.attacks.pgd import likeliest
from advmoe.core.settings import PositiveInt, Settings

FIRST_STEP = 2.0  # in units of epsilon: the ball's diameter
ONWARD = 0.75  # share of the new step; the rest is momentum, the previous move once more
RHO = 0.75  # with no larger share of rising steps than this since the last checkpoint, a step size is too large
FIRST_GAP, LEAST_GAP, SHRINK = 22, 6, 3  # distance of checkpoints, in percent of the steps

# (logits (b, K), rows (b,) of the batch they belong to) -> what to climb (b,)
Objective = Callable[[Tensor, Tensor], Tensor]


class ApgdCe(Settings):
    """`steps` sets the checkpoints too, which are shares of it; there is no step size to choose."""

    kind: Literal["apgd-ce"]
    steps: PositiveInt
    restarts: PositiveInt


class ApgdT(Settings):
    """`targets`: so many of the likeliest wrong classes are aimed at, one after another, each with all restarts; more
    than there are wrong classes are cut.
    """

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
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Climbs the cross-entropy of the true class.

    An image leaves at its first point that the model gets wrong and `fooled`, if there is one, confirms; if there is
    no such point, its point of the highest loss is returned.
    """
    search = _Search(model, images_BCHW, labels_B, ball, fooled, settings.steps)
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
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Climbs the targeted DLR towards one wrong class after another; ends as `apgd_ce` does.

    With fewer than four classes there is no targeted DLR, and the plain logit difference to the target takes its place.
    """
    search = _Search(model, images_BCHW, labels_B, ball, fooled, settings.steps)
    for targets_B in likeliest(model, images_BCHW, labels_B, settings.targets):
        for _ in range(settings.restarts):
            search.ascend(_towards(labels_B, targets_B), draws)
    return search.result


def _towards(labels_B: Tensor, targets_B: Tensor) -> Objective:
    def objective(logits: Tensor, rows: Tensor) -> Tensor:
        loss = targeted_dlr if logits.shape[1] >= 4 else lead
        return loss(logits, labels_B[rows], targets_B[rows])

    return objective


def dlr(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Difference of logits ratio (B,), max over i != y of z_i - z_y, over z_(1) - z_(3) (section 4.2 of the paper).

    Above 0 where the image is misclassified, and blind to the scale of the logits. Needs three classes. Where the true
    class ranks third it is 1 whatever the logits: no gradient there, and no sign of a broken model.
    """
    ranked = logits_BK.topk(3, dim=1).values
    return margin(logits_BK, labels_B) / (ranked[:, 0] - ranked[:, 2]).clamp_min(TINY)


def targeted_dlr(logits_BK: Tensor, labels_B: Tensor, targets_B: Tensor) -> Tensor:
    """Targeted DLR (B,), z_t - z_y over z_(1) - (z_(3) + z_(4)) / 2: never constant (section 4.2 of the paper).

    Above 0 where the target beats the true class. Needs four classes. Finite also where the four best logits tie, which
    bfloat16 makes common.
    """
    ranked = logits_BK.topk(4, dim=1).values
    spread = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2
    return lead(logits_BK, labels_B, targets_B) / spread.clamp_min(TINY)


def checkpoints(steps: int) -> dict[int, int]:
    """After which steps the step sizes are reviewed, each with the number of steps since the review before."""
    gap, least, shrink = (max(percent * steps // 100, 1) for percent in (FIRST_GAP, LEAST_GAP, SHRINK))
    found, done = {}, gap
    while done <= steps:
        found[done] = gap
        gap = max(gap - shrink, least)
        done += gap
    return found


@dataclass
class _Climb:
    """One ascent under way. Every field has a row for each image still open, so that one index drops the fallen."""

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
    rises: Tensor  # steps since the last checkpoint that raised the loss
    best_at_check: Tensor
    halved: Tensor  # at the last checkpoint

    @classmethod
    def begin(cls, rows: Tensor, images: Tensor, labels: Tensor, points: Tensor) -> "_Climb":
        """At `points` that have yet to be looked at: the first look is no rise (above +inf) but is the best (-inf)."""
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
            rises=torch.zeros_like(rows),
            best_at_check=-infinity,
            halved=torch.zeros_like(rows, dtype=torch.bool),
        )

    def keep(self, standing: Tensor) -> "_Climb":
        return _Climb(**{name: part[standing] for name, part in vars(self).items()})

    def move(self, ball: Ball, onward: float) -> None:
        """One step along the gradient, a little of it replaced by the previous move."""
        reach = _wide(self.step_size) * ball.epsilon
        aim = ball.project(self.points + reach * ball.steepest(self.gradient), self.images)
        moved = self.points + onward * (aim - self.points) + (1 - onward) * (self.points - self.previous)
        self.previous, self.points = self.points, ball.project(moved, self.images)

    def look(self, model: Model, objective: Objective) -> Tensor:
        """Loss and gradient where the points are now; which of them the model gets wrong (b,)."""
        self.gradient, logits = pixel_gradient(model, self.points, lambda output: objective(output, self.rows))
        loss = objective(logits, self.rows)
        self.rises += loss > self.loss
        better = loss > self.best_loss
        self.loss, self.best_loss = loss, torch.where(better, loss, self.best_loss)
        self.best_points = torch.where(_wide(better), self.points, self.best_points)
        self.best_gradient = torch.where(_wide(better), self.gradient, self.best_gradient)
        return logits.argmax(dim=1) != self.labels

    def review(self, gap: int) -> None:
        """At a checkpoint: halve the steps of the images that made too little of them, and send those to their best."""
        stuck = ~self.halved & (self.best_loss <= self.best_at_check)
        halve = (self.rises <= RHO * gap) | stuck
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        self.points = torch.where(_wide(halve), self.best_points, self.points)
        self.gradient = torch.where(_wide(halve), self.best_gradient, self.gradient)
        self.halved, self.best_at_check, self.rises = halve, self.best_loss, torch.zeros_like(self.rises)


@dataclass
class _Search:
    """A batch under attack: the best that is known of each image, and which are open; each ascent takes on those."""

    model: Model
    images: Tensor
    labels: Tensor
    ball: Ball
    fooled: IsAdversarial | None
    steps: int
    result: Tensor = field(init=False)
    best_loss: Tensor = field(init=False)  # (B,) over all ascents so far
    open: Tensor = field(init=False)  # rows (b,)

    def __post_init__(self) -> None:
        self.result = self.images.clone()
        self.best_loss = self.images.new_full(self.labels.shape, -torch.inf)
        self.open = torch.arange(len(self.images), device=self.images.device)

    def ascend(self, objective: Objective, draws: Draws) -> None:
        """All steps of one ascent from a random start, for the images still open."""
        if not len(self.open):
            return
        climb = self._begin(draws.pick(self.open))
        climb = self._retire(climb, climb.look(self.model, objective))
        reviews = checkpoints(self.steps)
        for step in range(1, self.steps + 1):
            if not len(climb.rows):
                break
            climb.move(self.ball, ONWARD if step > 1 else 1.0)
            climb = self._retire(climb, climb.look(self.model, objective))
            if step in reviews:
                climb.review(reviews[step])
        self._end(climb)

    def _begin(self, draws: Draws) -> _Climb:
        images = self.images[self.open]
        return _Climb.begin(self.open, images, self.labels[self.open], start(self.ball, images, draws))

    def _retire(self, climb: _Climb, wrong: Tensor) -> _Climb:
        """Without the images that are verified to be adversarial where they are now."""
        fallen = confirmed(wrong, climb.points, climb.labels, self.fooled)
        if not fallen.any():
            return climb
        self.result[climb.rows[fallen]] = climb.points[fallen]
        return climb.keep(~fallen)

    def _end(self, climb: _Climb) -> None:
        """The images of `climb` stay open; their best points count if no earlier ascent got higher."""
        better = climb.best_loss > self.best_loss[climb.rows]
        rows = climb.rows[better]
        self.result[rows], self.best_loss[rows] = climb.best_points[better], climb.best_loss[better]
        self.open = climb.rows


def start(ball: Ball, images_BCHW: Tensor, draws: Draws) -> Tensor:
    """A random point on the surface of the ball, cut to the box: noise scaled to norm epsilon, as the authors start."""
    if ball.norm == "linf":
        noise = draws.uniform(images_BCHW)
        direction = noise / noise.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(TINY)
    else:
        direction = ball.steepest(draws.normal(images_BCHW))
    return ball.project(images_BCHW + ball.epsilon * direction, images_BCHW)


def _wide(numbers_B: Tensor) -> Tensor:
    return numbers_B.view(-1, 1, 1, 1)

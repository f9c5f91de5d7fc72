"""FAB, targeted: walks along the decision boundary for the closest adversarial point; needs no epsilon.

Croce & Hein 2020, arXiv 1907.02044: linearise the boundary to another class, project on it inside the box, lean towards
the image, step back when across. One target class at a time, as in AutoAttack (arXiv 2003.01690), but with one forward
and one backward pass a step where the authors' code has two and one: the gradient is taken before stepping back, not
after, which came as close or closer on most images of the models tried, for half of the forward passes.

Shapes: B batch, b images still open, C channel, H/W pixels, D pixels of an image in one row, K classes, T targets.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import TINY, Ball, Draws, Norm, length
from advmoe.attacks.interface import IsAdversarial, Model, confirmed, lead, margin, pixel_gradient
from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings

# the method's constants: arXiv 1907.02044 and the authors' code in AutoAttack
ALPHA_MAX = 0.1  # the most that a step leans towards the image's own projection
ETA = 1.05  # overshoot, so that a step ends across the boundary and not on it
BETA = 0.9  # what is left of the way from the image after stepping back
SEARCH_STEPS = 3  # of the final search between the image and its closest point
# ours: the least a step gains, as a share of the image's way and of a pixel level; in bfloat16 walks would end on ties
NUDGE = 0.01
HAIR = 0.01  # ours: the share of what is left that a search step goes too far; on the boundary itself rounding decides
START: dict[Norm, float] = {"linf": 0.3, "l2": 1.0}  # widest random start is half of it: the authors' default epsilons


class FabT(Settings):
    """Steps and restarts are spent on each target anew: targets * restarts * steps gradients in all."""

    kind: Literal["fab-t"]
    steps: PositiveInt
    targets: PositiveInt  # the highest other logits; fewer where there are fewer other classes
    restarts: PositiveInt  # the first starts at the image itself


def fab_t(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: FabT,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """The closest adversarial point of each image, projected into the ball: unchanged, and so fooled, if it lay inside.

    With `fooled`, an image leaves at its first confirmed point inside the ball, however close others might be.
    """
    enough = 0.0 if fooled is None else ball.epsilon
    points_BCHW, _ = closest(
        model, images_BCHW, labels_B, norm=ball.norm, settings=settings, draws=draws, fooled=fooled, enough=enough
    )
    return ball.project(points_BCHW, images_BCHW)


def closest(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    norm: Norm,
    settings: FabT,
    draws: Draws,
    fooled: IsAdversarial | None = None,
    enough: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The closest adversarial point found for each image (B, C, H, W), and its distance (B,).

    An image that is wrong already is at distance 0. Where nothing was found the distance is inf and the point that of
    the largest margin. `fooled` confirms points as in every attack; an image is done at a distance of `enough`.
    """
    search = _Search(model, images_BCHW, labels_B, norm, fooled, enough)
    for targets_B in _targets(search.look(), labels_B, settings.targets):
        for restart in range(settings.restarts):
            rows = search.open()
            if len(rows):
                start = search.start(rows, draws.pick(rows)) if restart else images_BCHW[rows]
                _walk(search, rows, targets_B[rows], start, settings.steps)
    search.tighten()
    return search.points, search.distances


def to_plane(points_BD: Tensor, normals_BD: Tensor, gaps_B: Tensor, norm: Norm) -> Tensor:
    """The shortest change (B, D) with `normals . change = gaps` that keeps the points in the box [0, 1].

    Where the box has no such change, the one that comes closest to the gap: every pixel at its wall.

    Each pixel moves at its own pace (1 in L-inf, |normal| in L2) until its wall: change = min(time * pace, room). What
    is gained grows with time, concave and piecewise linear, so Newton's method from 0 never passes the exact time and,
    with ever more pixels at their walls, reaches it.
    """
    scale_B1 = normals_BD.abs().amax(1, keepdim=True).clamp_min(TINY)  # else squares of small gradients underflow
    uphill_BD = normals_BD / scale_B1 * gaps_B[:, None].sign()
    wanted_B1, weight_BD = gaps_B[:, None].abs() / scale_B1, uphill_BD.abs()
    room_BD = torch.where(uphill_BD > 0, 1 - points_BD, points_BD)
    pace_BD = torch.ones_like(weight_BD) if norm == "linf" else weight_BD
    whole_BD, speed_BD = weight_BD * room_BD, weight_BD * pace_BD  # a pixel's gain in all, and in a unit of time
    time_B1, earlier_B1 = torch.zeros_like(wanted_B1), torch.full_like(wanted_B1, -1)
    while (time_B1 > earlier_B1).any():
        walled_BD = time_B1 * pace_BD >= room_BD
        missing_B1 = wanted_B1 - (whole_BD * walled_BD).sum(1, keepdim=True)
        rate_B1 = (speed_BD * ~walled_BD).sum(1, keepdim=True)
        goal_B1 = torch.where(rate_B1 > 0, missing_B1 / rate_B1.clamp_min(TINY), time_B1)
        earlier_B1, time_B1 = time_B1, goal_B1.maximum(time_B1)
    return uphill_BD.sign() * torch.minimum(time_B1 * pace_BD, room_BD)


@dataclass
class _Search:
    """The images of one batch, and what is known of each: its closest adversarial point so far."""

    model: Model
    images: Tensor
    labels: Tensor
    norm: Norm
    fooled: IsAdversarial | None
    enough: float
    points: Tensor = field(init=False)
    distances: Tensor = field(init=False)
    margins: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.points = self.images.clone()
        self.distances = torch.full_like(self.images[:, 0, 0, 0], torch.inf)
        self.margins = -self.distances

    def open(self) -> Tensor:
        """The images that are not done (b,)."""
        return (self.distances > self.enough).nonzero().squeeze(1)

    def look(self) -> Tensor:
        """Judge the images themselves; their logits (B, K)."""
        logits_BK = self.logits(self.images)
        self.judge(torch.arange(len(self.images), device=self.images.device), self.images, logits_BK)
        return logits_BK

    @torch.no_grad()
    def logits(self, points: Tensor) -> Tensor:
        return self.model(points)

    def judge(self, rows: Tensor, points: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Which points are adversarial, and which only look so (b,); remembers those that are the closest yet.

        `fooled` costs a forward pass, so it is asked only about points that would be the closest.
        """
        labels = self.labels[rows]
        distances, margins = length(points - self.images[rows], self.norm), margin(logits, labels)
        wrong = logits.argmax(1) != labels
        closer = wrong & (distances < self.distances[rows])
        fallen = confirmed(closer, points, labels, self.fooled)
        denied, closer = closer & ~fallen, fallen
        likelier = ~closer & self.distances[rows].isinf() & (margins > self.margins[rows])
        self.margins[rows[likelier]] = margins[likelier]
        self.distances[rows[closer]] = distances[closer]
        self.points[rows[closer | likelier]] = points[closer | likelier]
        return wrong & ~denied, denied

    def start(self, rows: Tensor, draws: Draws) -> Tensor:
        """A random point in the box, half as far away as the closest one known."""
        images = self.images[rows]
        noise = draws.uniform(images) if self.norm == "linf" else draws.normal(images)
        radius = self.distances[rows].clamp_max(START[self.norm]) / 2
        return (images + _wide(radius / length(noise, self.norm).clamp_min(TINY)) * noise).clamp(0, 1)

    def tighten(self) -> None:
        """The paper's final search, for points not close enough yet, on the line from the image to its closest point.

        Each step tries where the margin would cross 0 if it were linear in between, and moves one end there.
        """
        rows = self.open()
        rows = rows[self.distances[rows].isfinite()]
        near, far = self.images[rows], self.points[rows]
        for _ in range(SEARCH_STEPS):
            if not len(rows):
                return
            labels = self.labels[rows]
            below, above = (margin(self.logits(end), labels) for end in (near, far))
            share = (-below / (above - below).clamp_min(TINY)).clamp(0, 1)
            points = near + _wide(share + HAIR * (1 - share)) * (far - near)
            crossed, _ = self.judge(rows, points, self.logits(points))
            near, far = torch.where(_wide(crossed), near, points), torch.where(_wide(crossed), points, far)
            keep = self.distances[rows] > self.enough
            rows, near, far = rows[keep], near[keep], far[keep]


def _walk(search: _Search, rows: Tensor, targets: Tensor, points: Tensor, steps: int) -> None:
    """`steps` steps towards the boundary between label and target class and along it, for the images `rows` (b,)."""
    for _ in range(steps):
        gain = partial(lead, labels_B=search.labels[rows], targets_B=targets)
        gradient, logits = pixel_gradient(search.model, points, gain)
        crossed, denied = search.judge(rows, points, logits)
        # a point that only looks adversarial aims as far beyond the model's boundary as it is beyond it now
        value = torch.where(denied, -gain(logits).abs(), gain(logits))
        points = _step(search.images[rows], points, crossed, value, gradient, search.norm)
        keep = search.distances[rows] > search.enough
        rows, targets, points = rows[keep], targets[keep], points[keep]
        if not len(rows):
            return
    search.judge(rows, points, search.logits(points))


def _step(images: Tensor, points: Tensor, crossed: Tensor, value: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """The next points: back from the boundary if across, then onto it, linearised at `points`, leaning to the image."""
    origins = torch.where(_wide(crossed), images + BETA * (points - images), points)

    def gap(start: Tensor) -> Tensor:
        return -value - (gradient * (start - points)).flatten(1).sum(1)

    def change(start: Tensor, gaps: Tensor) -> Tensor:
        return to_plane(start.flatten(1), gradient.flatten(1), gaps, norm).view_as(start)

    ahead, whole = gap(origins), gap(images)
    least = NUDGE * torch.maximum(whole.abs(), gradient.flatten(1).abs().sum(1) / PIXEL_LEVELS)
    direct = change(origins, torch.where(~crossed & (ahead.abs() < least), least, ahead))
    biased = change(images, whole)
    direct_B, biased_B = length(direct, norm), length(biased, norm)
    lean = _wide((direct_B / (direct_B + biased_B).clamp_min(TINY)).clamp_max(ALPHA_MAX))
    return ((1 - lean) * (origins + ETA * direct) + lean * (images + ETA * biased)).clamp(0, 1)


def _targets(logits_BK: Tensor, labels_B: Tensor, targets: int) -> Tensor:
    """The other classes by falling logit (T, B)."""
    others_BK = logits_BK.scatter(1, labels_B[:, None], -torch.inf)
    order_BK = others_BK.argsort(dim=1, descending=True, stable=True)
    return order_BK[:, : min(targets, logits_BK.shape[1] - 1)].T


def _wide(numbers_B: Tensor) -> Tensor:
    return numbers_B.view(-1, 1, 1, 1)

"""FAB, targeted: finds the closest adversarial point along the decision boundary; needs no epsilon.

Croce & Hein 2020, arXiv 1907.02044: linearises the boundary to another class, projects onto it inside the box with a
bias towards the image, and steps back after crossing it. One target class at a time, as in AutoAttack (arXiv
2003.01690), but with one forward and one backward pass per step instead of two and one: the gradient is taken before
stepping back, not after, which was as close or closer on most images of the models tried.

Shapes: B batch, b images still under attack, C channel, H/W pixels, D values of a flattened image, K classes, T target
classes.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import TINY, Ball, Norm, RandomStream, perturbation_norm
from advmoe.attacks.interface import IsAdversarial, Model, confirm_adversarial, margin, pixel_gradient, target_margin
from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings

# the method's constants: arXiv 1907.02044 and the authors' code in AutoAttack
ALPHA_MAX = 0.1  # largest weight of the step from the original image
OVERSHOOT = 1.05  # eta: extrapolation, so that a step crosses the boundary
BACKWARD_STEP = 0.9  # beta: share of the distance from the image after stepping back
SEARCH_STEPS = 3  # of the final search between the image and its closest adversarial point
# ours: least progress of a step, as a share of the image's gap and of a pixel level; avoids ties in bfloat16
MIN_STEP = 0.01
# ours: overshoot of a search step beyond the boundary, as a share of the remaining distance; avoids ties by rounding
SEARCH_OVERSHOOT = 0.01
# random starts are at most half of this away from the image: the authors' default epsilons
START_DISTANCE: dict[Norm, float] = {"linf": 0.3, "l2": 1.0}


class FabT(Settings):
    """Steps and restarts apply to each target class: targets * restarts * steps gradients in total."""

    kind: Literal["fab-t"]
    steps: PositiveInt
    targets: PositiveInt  # other classes with the highest logits; at most classes - 1
    restarts: PositiveInt  # the first starts at the original image


def fab_t(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: FabT,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the closest adversarial point of each image, projected into the ball.

    With `is_adversarial`, an image leaves at its first confirmed point inside the ball.
    """
    stop_distance = 0.0 if is_adversarial is None else ball.epsilon
    points_BCHW, _ = closest_adversarial(
        model,
        images_BCHW,
        labels_B,
        norm=ball.norm,
        settings=settings,
        draws=draws,
        is_adversarial=is_adversarial,
        stop_distance=stop_distance,
    )
    return ball.project(points_BCHW, images_BCHW)


def closest_adversarial(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    norm: Norm,
    settings: FabT,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
    stop_distance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns the closest adversarial point found for each image (B, C, H, W), and its distance (B,).

    The distance is 0 for an image that is misclassified already. If no adversarial point is found, the distance is inf
    and the point is that of the largest margin. `is_adversarial` confirms points as in every attack. The search for an
    image ends at a distance of at most `stop_distance`.
    """
    search = _FabSearch(model, images_BCHW, labels_B, norm, is_adversarial, stop_distance)
    for targets_B in _targets(search.evaluate_images(), labels_B, settings.targets):
        for restart in range(settings.restarts):
            rows = search.active()
            if len(rows):
                start = search.start(rows, draws.pick(rows)) if restart else images_BCHW[rows]
                _walk(search, rows, targets_B[rows], start, settings.steps)
    search.refine()
    return search.points, search.distances


def project_onto_plane(points_BD: Tensor, normals_BD: Tensor, gaps_B: Tensor, norm: Norm) -> Tensor:
    """Returns the smallest change (B, D) with `normals . change = gaps` that keeps the points in the box [0, 1].

    If the box contains no such change, returns the one closest to the gap: every pixel at its bound.

    The solution has the form change = min(time * rate, room) with a rate per pixel (1 in L-inf, |normal| in L2) and its
    distance `room` to the bound. `normals . change` is concave and piecewise linear in time, so Newton's method from 0
    never overshoots the exact time and reaches it in finitely many steps.
    """
    scale_B1 = normals_BD.abs().amax(1, keepdim=True).clamp_min(TINY)  # avoids underflow of squares of small gradients
    direction_BD = normals_BD / scale_B1 * gaps_B[:, None].sign()
    wanted_B1, weight_BD = gaps_B[:, None].abs() / scale_B1, direction_BD.abs()
    room_BD = torch.where(direction_BD > 0, 1 - points_BD, points_BD)
    rate_BD = torch.ones_like(weight_BD) if norm == "linf" else weight_BD
    full_gain_BD, gain_rate_BD = (
        weight_BD * room_BD,
        weight_BD * rate_BD,
    )  # gain of a pixel at its bound, and per unit of time
    time_B1, earlier_B1 = torch.zeros_like(wanted_B1), torch.full_like(wanted_B1, -1)
    while (time_B1 > earlier_B1).any():
        bounded_BD = time_B1 * rate_BD >= room_BD
        missing_B1 = wanted_B1 - (full_gain_BD * bounded_BD).sum(1, keepdim=True)
        slope_B1 = (gain_rate_BD * ~bounded_BD).sum(1, keepdim=True)
        next_B1 = torch.where(slope_B1 > 0, missing_B1 / slope_B1.clamp_min(TINY), time_B1)
        earlier_B1, time_B1 = time_B1, next_B1.maximum(time_B1)
    return direction_BD.sign() * torch.minimum(time_B1 * rate_BD, room_BD)


@dataclass
class _FabSearch:
    """The images of one batch, and the closest adversarial point of each so far."""

    model: Model
    images: Tensor
    labels: Tensor
    norm: Norm
    is_adversarial: IsAdversarial | None
    stop_distance: float
    points: Tensor = field(init=False)
    distances: Tensor = field(init=False)
    margins: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.points = self.images.clone()
        self.distances = torch.full_like(self.images[:, 0, 0, 0], torch.inf)
        self.margins = -self.distances

    def active(self) -> Tensor:
        """Returns the indices (b,) of the images still under attack."""
        return (self.distances > self.stop_distance).nonzero().squeeze(1)

    def evaluate_images(self) -> Tensor:
        """Evaluates the original images; returns their logits (B, K)."""
        logits_BK = self.logits(self.images)
        self.update(torch.arange(len(self.images), device=self.images.device), self.images, logits_BK)
        return logits_BK

    @torch.no_grad()
    def logits(self, points: Tensor) -> Tensor:
        return self.model(points)

    def update(self, rows: Tensor, points: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Stores closer points; returns which are adversarial and which `is_adversarial` rejects, (b,) bool each.

        `is_adversarial` costs a forward pass, so it checks only points that would be the closest.
        """
        labels = self.labels[rows]
        distances, margins = perturbation_norm(points - self.images[rows], self.norm), margin(logits, labels)
        wrong = logits.argmax(1) != labels
        closer = wrong & (distances < self.distances[rows])
        is_confirmed = confirm_adversarial(closer, points, labels, self.is_adversarial)
        rejected, closer = closer & ~is_confirmed, is_confirmed
        larger_margin = ~closer & self.distances[rows].isinf() & (margins > self.margins[rows])
        self.margins[rows[larger_margin]] = margins[larger_margin]
        self.distances[rows[closer]] = distances[closer]
        self.points[rows[closer | larger_margin]] = points[closer | larger_margin]
        return wrong & ~rejected, rejected

    def start(self, rows: Tensor, draws: RandomStream) -> Tensor:
        """Returns random points in the box, at half the distance of the closest adversarial point."""
        images = self.images[rows]
        noise = draws.uniform(images) if self.norm == "linf" else draws.normal(images)
        radius = self.distances[rows].clamp_max(START_DISTANCE[self.norm]) / 2
        return (images + _broadcast(radius / perturbation_norm(noise, self.norm).clamp_min(TINY)) * noise).clamp(0, 1)

    def refine(self) -> None:
        """The paper's final search on the line from the image to its closest point, for points above the stop distance.

        Each step evaluates the point where the margin, interpolated linearly, crosses 0, and moves one end there.
        """
        rows = self.active()
        rows = rows[self.distances[rows].isfinite()]
        near, far = self.images[rows], self.points[rows]
        for _ in range(SEARCH_STEPS):
            if not len(rows):
                return
            labels = self.labels[rows]
            below, above = (margin(self.logits(end), labels) for end in (near, far))
            share = (-below / (above - below).clamp_min(TINY)).clamp(0, 1)
            points = near + _broadcast(share + SEARCH_OVERSHOOT * (1 - share)) * (far - near)
            crossed, _ = self.update(rows, points, self.logits(points))
            near, far = torch.where(_broadcast(crossed), near, points), torch.where(_broadcast(crossed), points, far)
            keep = self.distances[rows] > self.stop_distance
            rows, near, far = rows[keep], near[keep], far[keep]


def _walk(search: _FabSearch, rows: Tensor, targets: Tensor, points: Tensor, steps: int) -> None:
    """Runs `steps` steps towards and along the boundary between label and target class, for the images `rows` (b,)."""
    for _ in range(steps):
        gain = partial(target_margin, labels_B=search.labels[rows], targets_B=targets)
        gradient, logits = pixel_gradient(search.model, points, gain)
        crossed, rejected = search.update(rows, points, logits)
        # a rejected point moves as far beyond the model's boundary again as it is beyond it now
        value = torch.where(rejected, -gain(logits).abs(), gain(logits))
        points = _step(search.images[rows], points, crossed, value, gradient, search.norm)
        keep = search.distances[rows] > search.stop_distance
        rows, targets, points = rows[keep], targets[keep], points[keep]
        if not len(rows):
            return
    search.update(rows, points, search.logits(points))


def _step(images: Tensor, points: Tensor, crossed: Tensor, value: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """Returns the next points: steps back if across the boundary, then projects onto it, with a bias to the image."""
    origins = torch.where(_broadcast(crossed), images + BACKWARD_STEP * (points - images), points)

    def gap(start: Tensor) -> Tensor:
        return -value - (gradient * (start - points)).flatten(1).sum(1)

    def change(start: Tensor, gaps: Tensor) -> Tensor:
        return project_onto_plane(start.flatten(1), gradient.flatten(1), gaps, norm).view_as(start)

    ahead, whole = gap(origins), gap(images)
    least = MIN_STEP * torch.maximum(whole.abs(), gradient.flatten(1).abs().sum(1) / PIXEL_LEVELS)
    direct = change(origins, torch.where(~crossed & (ahead.abs() < least), least, ahead))
    biased = change(images, whole)
    direct_B, biased_B = perturbation_norm(direct, norm), perturbation_norm(biased, norm)
    lean = _broadcast((direct_B / (direct_B + biased_B).clamp_min(TINY)).clamp_max(ALPHA_MAX))
    return ((1 - lean) * (origins + OVERSHOOT * direct) + lean * (images + OVERSHOOT * biased)).clamp(0, 1)


def _targets(logits_BK: Tensor, labels_B: Tensor, targets: int) -> Tensor:
    """Returns the other classes by decreasing logit (T, B)."""
    others_BK = logits_BK.scatter(1, labels_B[:, None], -torch.inf)
    order_BK = others_BK.argsort(dim=1, descending=True, stable=True)
    return order_BK[:, : min(targets, logits_BK.shape[1] - 1)].T


def _broadcast(numbers_B: Tensor) -> Tensor:
    return numbers_B.view(-1, 1, 1, 1)

"""PGD: projected gradient ascent from a random start (Madry et al. 2018, arXiv 1706.06083).

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.model import Fooled, Loss, Model, input_gradient
from advmoe.params import PositiveFloat, PositiveInt, Settings


class Pgd(Settings):
    """`step_size` is relative to epsilon, so that one number serves every epsilon."""

    kind: Literal["pgd"]
    steps: PositiveInt
    step_size: PositiveFloat
    restarts: PositiveInt
    loss: Loss


def pgd(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Pgd,
    draws: Draws,
    fooled: Fooled | None = None,
) -> Tensor:
    """The last point of the ascent, inside the ball and [0, 1].

    `fooled(points, labels)` says (B,) which points the caller counts as adversarial; it is asked about those that the
    model itself gets wrong, and at the end of a restart about all that are left. With it an image leaves the ascent,
    and is spared the remaining restarts, at its first such point, which is returned. Without it every image takes all
    steps of every restart, as training wants.
    """
    result = images_BCHW.clone()
    open_ = torch.arange(len(images_BCHW), device=images_BCHW.device)
    for _ in range(settings.restarts):
        # drawn for the whole batch, so that an image's start does not depend on which others have fallen
        start = ball.start(images_BCHW, draws)[open_]
        open_ = _ascend(model, images_BCHW[open_], labels_B[open_], start, open_, result, ball, settings, fooled)
    return result


def _ascend(
    model: Model,
    images: Tensor,
    labels: Tensor,
    points: Tensor,
    open_: Tensor,
    result: Tensor,
    ball: Ball,
    settings: Pgd,
    fooled: Fooled | None,
) -> Tensor:
    """One restart for the images numbered `open_`: writes where they end into `result`, returns those still open."""
    for _ in range(settings.steps):
        if not len(open_):
            return open_
        gradient, logits = input_gradient(model, points, labels, settings.loss)
        if fooled is not None:
            fallen = logits.argmax(dim=1) != labels
            fallen[fallen.clone()] = fooled(points[fallen], labels[fallen])
            result[open_[fallen]] = points[fallen]
            points, images, labels, open_, gradient = (
                part[~fallen] for part in (points, images, labels, open_, gradient)
            )
        points = ball.project(points + settings.step_size * ball.epsilon * ball.steepest(gradient), images)
    result[open_] = points
    return open_ if fooled is None else open_[~fooled(points, labels)]

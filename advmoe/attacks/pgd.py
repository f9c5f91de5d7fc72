"""PGD: projected gradient ascent from random starts (Madry et al. 2018, arXiv 1706.06083).

Untargeted, it maximises a loss of the true class; targeted, it moves towards one wrong class after another (with the
logit difference of Carlini & Wagner 2017 if the loss is `margin`).

Shapes: B batch, b images still under attack, C channel, H/W pixels, K classes.
"""

from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import (
    IsAdversarial,
    Loss,
    Model,
    cross_entropy,
    input_gradient,
    pixel_gradient,
    target_margin,
)
from advmoe.attacks.pgd_loop import GradientAscent, Objective
from advmoe.core.settings import NonNegativeInt, PositiveFloat, PositiveInt, Settings


class Pgd(Settings):
    """`step_size` is relative to epsilon. `targets`: number of most likely wrong classes to target in turn, each with
    all restarts; at most classes - 1; 0 for untargeted.
    """

    kind: Literal["pgd"]
    steps: PositiveInt
    step_size: PositiveFloat
    restarts: PositiveInt
    loss: Loss
    targets: NonNegativeInt


def pgd(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Pgd,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the last point of the ascent, inside the ball and [0, 1].

    `is_adversarial` checks the points that the model misclassifies, and all points at the end of a restart. Without it
    every image takes all steps of every restart, as training needs.
    """
    ascent = GradientAscent(images_BCHW, labels_B, ball, is_adversarial)
    for objective in _objectives(model, images_BCHW, labels_B, settings):
        for _ in range(settings.restarts):
            ascent.run(objective, settings.steps, settings.step_size, draws)
    return ascent.result


def _objectives(model: Model, images: Tensor, labels: Tensor, settings: Pgd) -> list[Objective]:
    if not settings.targets:
        return [untargeted(model, labels, settings.loss)]
    return [
        targeted(model, labels, targets_B, settings.loss)
        for targets_B in top_wrong_classes(model, images, labels, settings.targets)
    ]


def untargeted(model: Model, labels_B: Tensor, loss: Loss) -> Objective:
    """Returns the objective that maximises the loss of the true class."""

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        gradient, logits = input_gradient(model, points, labels_B[rows], loss)
        return gradient, logits.argmax(dim=1) != labels_B[rows]

    return objective


def targeted(model: Model, labels_B: Tensor, targets_B: Tensor, loss: Loss) -> Objective:
    """Returns the objective that maximises -CE of a target class, or its logit minus the true one (`margin`)."""

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels, targets = labels_B[rows], targets_B[rows]

        def gain(logits: Tensor) -> Tensor:
            return -cross_entropy(logits, targets) if loss == "ce" else target_margin(logits, labels, targets)

        gradient, logits = pixel_gradient(model, points, gain)
        return gradient, logits.argmax(dim=1) != labels

    return objective


def top_wrong_classes(model: Model, images_BCHW: Tensor, labels_B: Tensor, targets: int) -> list[Tensor]:
    """Returns the wrong classes with the highest logits on the images: at most `targets` tensors (B,), best first."""
    with torch.no_grad():
        logits_BK = model(images_BCHW).scatter(1, labels_B[:, None], -torch.inf)
    wrong = min(targets, logits_BK.shape[1] - 1)
    return list(logits_BK.topk(wrong, dim=1).indices.unbind(dim=1))

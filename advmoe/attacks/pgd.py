"""PGD: projected gradient ascent from random starts (Madry et al. 2018, arXiv 1706.06083).

Untargeted it climbs a loss away from the true class; targeted, towards one wrong class after another (Carlini-Wagner
2017's logit difference when the loss is `margin`).

Shapes: B batch, b images still open, C channel, H/W pixels, K classes.
"""

from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Loss, Model, cross_entropy, input_gradient, lead, pixel_gradient
from advmoe.attacks.pgd_loop import GradientAscent, Objective
from advmoe.core.settings import NonNegativeInt, PositiveFloat, PositiveInt, Settings


class Pgd(Settings):
    """`step_size` is relative to epsilon, so that one number serves every epsilon; `targets`: so many of the likeliest
    wrong classes are aimed at, each with all restarts; 0 for untargeted. More targets than wrong classes are cut.
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
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """The last point of the ascent, inside the ball and [0, 1].

    `fooled` is asked about those points that the model itself gets wrong, and at the end of a restart about all that
    are left. Without it every image takes all steps of every restart, as training wants.
    """
    climb = GradientAscent(images_BCHW, labels_B, ball, fooled)
    for objective in _objectives(model, images_BCHW, labels_B, settings):
        for _ in range(settings.restarts):
            climb.ascend(objective, settings.steps, settings.step_size, draws)
    return climb.result


def _objectives(model: Model, images: Tensor, labels: Tensor, settings: Pgd) -> list[Objective]:
    if not settings.targets:
        return [untargeted(model, labels, settings.loss)]
    return [
        towards(model, labels, goals_B, settings.loss) for goals_B in likeliest(model, images, labels, settings.targets)
    ]


def untargeted(model: Model, labels_B: Tensor, loss: Loss) -> Objective:
    """Climb the loss of the true class."""

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        gradient, logits = input_gradient(model, points, labels_B[rows], loss)
        return gradient, logits.argmax(dim=1) != labels_B[rows]

    return objective


def towards(model: Model, labels_B: Tensor, goals_B: Tensor, loss: Loss) -> Objective:
    """Climb towards a wrong class for each image: minus its cross-entropy, or its logit minus the true one's."""

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels, goals = labels_B[rows], goals_B[rows]

        def gain(logits: Tensor) -> Tensor:
            return -cross_entropy(logits, goals) if loss == "ce" else lead(logits, labels, goals)

        gradient, logits = pixel_gradient(model, points, gain)
        return gradient, logits.argmax(dim=1) != labels

    return objective


def likeliest(model: Model, images_BCHW: Tensor, labels_B: Tensor, targets: int) -> list[Tensor]:
    """The wrong classes with the highest logits on the clean images: at most `targets` tensors (B,), best first."""
    with torch.no_grad():
        logits_BK = model(images_BCHW).scatter(1, labels_B[:, None], -torch.inf)
    wrong = min(targets, logits_BK.shape[1] - 1)
    return list(logits_BK.topk(wrong, dim=1).indices.unbind(dim=1))

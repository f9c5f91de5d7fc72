"""FGSM: one step of size epsilon along the sign of the gradient (Goodfellow et al. 2015, arXiv 1412.6572).

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Model, input_gradient
from advmoe.core.settings import Settings


class Fgsm(Settings):
    """FGSM has no numbers of its own: epsilon is the ball's."""

    kind: Literal["fgsm"]


def fgsm(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Fgsm,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """The image plus epsilon * steepest(grad CE), inside the ball and [0, 1]; in L2 the step is the normed gradient."""
    del settings, draws, fooled  # one deterministic step, and nothing to leave early
    gradient, _ = input_gradient(model, images_BCHW, labels_B, "ce")
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(gradient), images_BCHW).detach()

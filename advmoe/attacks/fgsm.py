"""FGSM: one step of size epsilon along the sign of the gradient (Goodfellow et al. 2015, arXiv 1412.6572).

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import IsAdversarial, Model, input_gradient
from advmoe.core.settings import Settings


class Fgsm(Settings):
    """FGSM has no settings of its own; epsilon is that of the ball."""

    kind: Literal["fgsm"]


def fgsm(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Fgsm,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns image + epsilon * steepest(grad CE), inside the ball and [0, 1]; in L2 along the normalised gradient."""
    del settings, draws, is_adversarial  # one deterministic step
    gradient, _ = input_gradient(model, images_BCHW, labels_B, "ce")
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(gradient), images_BCHW).detach()

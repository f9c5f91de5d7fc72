"""N-FGSM: one step from a point of wide noise, which does not overfit as plain FGSM can (de Jorge et al., NeurIPS 2022,
arXiv 2202.01181).

    x' = clip(x + eta + step * sign(grad CE(x + eta)), 0, 1),    eta uniform in [-noise, noise]

noise and step relative to epsilon, in the paper 2 and 1. Nothing brings x' back into the ball: what is trained on lies
up to three times as far out as what is defended against, and that is the method.

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Model, input_gradient
from advmoe.core.settings import PositiveFloat, Settings


class NFgsm(Settings):
    """`noise` and `step_size` are relative to epsilon."""

    kind: Literal["n-fgsm"]
    noise: PositiveFloat
    step_size: PositiveFloat


def nfgsm(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: NFgsm,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Training images with noise and one step, inside [0, 1]. Not for evaluation: it leaves the ball."""
    del fooled
    around_BCHW = images_BCHW + settings.noise * ball.epsilon * draws.uniform(images_BCHW)
    gradient, _ = input_gradient(model, around_BCHW, labels_B, "ce")
    return (around_BCHW + settings.step_size * ball.epsilon * ball.steepest(gradient)).clamp(0, 1).detach()

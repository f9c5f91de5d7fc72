"""N-FGSM: one step from a point with large noise, without the catastrophic overfitting of plain FGSM (de Jorge et al.,
NeurIPS 2022, arXiv 2202.01181).

    x' = clip(x + eta + step * sign(grad CE(x + eta)), 0, 1),    eta uniform in [-noise, noise]

noise and step are relative to epsilon, in the paper 2 and 1. x' is not projected onto the ball: training images lie up
to three epsilon away, by design of the method.

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
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
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns training images after noise and one step, in [0, 1]. Not for evaluation: they leave the ball."""
    del is_adversarial
    noisy_BCHW = images_BCHW + settings.noise * ball.epsilon * draws.uniform(images_BCHW)
    gradient, _ = input_gradient(model, noisy_BCHW, labels_B, "ce")
    return (noisy_BCHW + settings.step_size * ball.epsilon * ball.steepest(gradient)).clamp(0, 1).detach()

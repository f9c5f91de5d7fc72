"""TRADES: the trade-off between accuracy and robustness as two terms of one loss (Zhang et al. 2019, arXiv 1901.08573).

Cross-entropy on the clean images plus beta * KL(p(. | clean) || p(. | attacked)); the attack maximises that KL, so
labels play no part in it.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import IsAdversarial, Model, pixel_gradient
from advmoe.core.settings import PositiveFloat, PositiveInt, Settings

START_STD = 1e-3  # of the normal noise at the start: at the image itself the gradient of the divergence is zero


class Trades(Settings):
    """`step_size` is relative to epsilon."""

    kind: Literal["trades"]
    steps: PositiveInt
    step_size: PositiveFloat


def trades(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Trades,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the last point of the ascent on the divergence, in the ball and [0, 1]; every image takes all steps."""
    del labels_B, is_adversarial
    with torch.no_grad():
        clean_BK = functional.log_softmax(model(images_BCHW), dim=1)
    points = ball.project(images_BCHW + START_STD * draws.normal(images_BCHW), images_BCHW)
    for _ in range(settings.steps):
        gradient, _logits = pixel_gradient(model, points, lambda logits_BK: kl_divergence(clean_BK, logits_BK))
        points = ball.project(points + settings.step_size * ball.epsilon * ball.steepest(gradient), images_BCHW)
    return points


def kl_divergence(clean_BK: Tensor, attacked_BK: Tensor) -> Tensor:
    """Returns KL(p(. | clean) || p(. | attacked)) of each image (B,), from logits or log-probabilities."""
    clean_BK, attacked_BK = functional.log_softmax(clean_BK, dim=1), functional.log_softmax(attacked_BK, dim=1)
    return functional.kl_div(attacked_BK, clean_BK, reduction="none", log_target=True).sum(dim=1)


def trades_loss(clean_BK: Tensor, attacked_BK: Tensor, labels_B: Tensor, beta: float) -> Tensor:
    """Returns the outer loss, a mean over the batch."""
    return functional.cross_entropy(clean_BK, labels_B) + beta * kl_divergence(clean_BK, attacked_BK).mean()

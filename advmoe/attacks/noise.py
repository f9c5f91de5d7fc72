"""Random points of the ball: a lower bound for the success rate of every attack.

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.black_box import BestPoints
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.core.settings import PositiveInt, Settings


class Noise(Settings):
    """`draws`: number of random points, one query each."""

    kind: Literal["noise"]
    draws: PositiveInt


@torch.no_grad()
def noise(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Noise,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the first adversarial random point, else the one of highest margin; inside the ball and [0, 1]."""
    best = BestPoints(model, images_BCHW, labels_B, is_adversarial)
    for _ in range(settings.draws):
        if not len(best.active):
            break
        best.query(ball.start(images_BCHW[best.active], draws.pick(best.active)))
    return best.points

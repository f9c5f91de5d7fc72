"""Random points of the ball: not an attack but a floor that every attack must be above.

Shapes: B batch, C channel, H/W pixels.
"""

from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.black_box import BestPoints
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.core.settings import PositiveInt, Settings


class Noise(Settings):
    """`draws` is how many points are tried, one query each."""

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
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """The first random point that fools the model, else the one of highest margin; inside the ball and [0, 1]."""
    best = BestPoints(model, images_BCHW, labels_B, fooled)
    for _ in range(settings.draws):
        if not len(best.open):
            break
        best.offer(ball.start(images_BCHW[best.open], draws.pick(best.open)))
    return best.points

"""Noise that moves images towards labels: the inner loop of both availability attacks.

Shapes: B batch, C channel, H/W pixels.
"""

import torch
from torch import Tensor, nn

from advmoe import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.model import input_gradient

BATCH = 256  # images at once


def towards(
    model: nn.Module,
    images_NCHW: Tensor,
    points_NCHW: Tensor,
    labels_N: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """Points (N, C, H, W) after `steps` signed steps down the cross-entropy of `labels`, in the L-inf ball around the
    images. `step_size` is relative to epsilon; the model is frozen meanwhile.
    """
    ball, place, moved = LInf(epsilon), next(model.parameters()).device, []
    with engine.crafting(model, "float32") as cheap:
        for rows in torch.split(torch.arange(len(labels_N)), BATCH):
            images, points, labels = (each[rows].to(place) for each in (images_NCHW, points_NCHW, labels_N))
            for _ in range(steps):
                gradient, _ = input_gradient(cheap, points, labels, "ce")
                points = ball.project(points - step_size * epsilon * ball.steepest(gradient), images)
            moved.append(points.cpu())
    return torch.cat(moved)

"""Noise that moves images towards labels: what both availability attacks make.

Shapes: N images, M chosen ones, C channel, H/W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, to_levels
from advmoe.attacks.interface import input_gradient
from advmoe.core.settings import Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.threats.poisoning.poisoned_set import Poisoned, change, choose, count

BATCH = 256  # images at once


class Noise(Settings):
    """`steps` of `step_size`, relative to `epsilon` (L-inf), are taken at a time."""

    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat


def noisy(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    rate: float,
    epsilon: float,
    make: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Poisoned:
    """A share `rate` of all images, each with noise of its own, labels true.

    `make(images, points, labels)` (M, ...) returns the final points, from random ones in the ball.
    """
    of = "the training set"
    rows = choose(torch.arange(len(labels_N)), count(rate, len(labels_N), of), of, stream)
    images = images_NCHW[rows].float() / 255
    start = (torch.rand(images.shape, generator=stream) * 2 - 1) * epsilon
    points = make(images, (images + start).clamp(0, 1), labels_N[rows])
    new_images = to_levels(points, images_NCHW[rows], epsilon)
    return change(images_NCHW, labels_N, rows, of=of, available=len(labels_N), new_images=new_images)


def towards(model: nn.Module, images_NCHW: Tensor, points_NCHW: Tensor, labels_N: Tensor, noise: Noise) -> Tensor:
    """Points (N, C, H, W) after signed steps down the cross-entropy of `labels`, in the ball around the images.

    The model is frozen meanwhile.
    """
    ball, place, moved = LInf(noise.epsilon), next(model.parameters()).device, []
    with engine.attack_mode(model, "float32") as cheap:
        for rows in torch.split(torch.arange(len(labels_N)), BATCH):
            images, points, labels = (each[rows].to(place) for each in (images_NCHW, points_NCHW, labels_N))
            for _ in range(noise.steps):
                gradient, _ = input_gradient(cheap, points, labels, "ce")
                points = ball.project(points - noise.step_size * noise.epsilon * ball.steepest(gradient), images)
            moved.append(points.cpu())
    return torch.cat(moved)

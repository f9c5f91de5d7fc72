"""Adversarial poison: images that a trained network takes for the next class, under their own label (Fowl et al. 2021,
"Adversarial examples make strong poisons", arXiv 2106.10807, the targeted variant).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.params import Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.threats.poisoning.noise import towards
from advmoe.threats.poisoning.poisoned import Poisoned, change, choose, count, to_levels


class ErrorMaximising(Settings):
    """`steps` of `step_size` (relative to `epsilon`, L-inf) towards class y + 1 mod K on the `proxy`, a baseline's twin
    trained under a seed of its own. The rate is a share of the set.
    """

    kind: Literal["error-maximising"]
    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat
    proxy: str


def error_maximising(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    settings: ErrorMaximising,
    *,
    rate: float,
    classes: int,
    proxy: nn.Module,
) -> Poisoned:
    """Every chosen image moved towards the next class, labels true."""
    of = "the training set"
    rows = choose(torch.arange(len(labels_N)), count(rate, len(labels_N), of), of, stream)
    images, wanted = images_NCHW[rows].float() / 255, (labels_N[rows] + 1) % classes
    start = (torch.rand(images.shape, generator=stream) * 2 - 1) * settings.epsilon
    points = towards(
        proxy,
        images,
        (images + start).clamp(0, 1),
        wanted,
        epsilon=settings.epsilon,
        steps=settings.steps,
        step_size=settings.step_size,
    )
    new_images = to_levels(points, images_NCHW[rows], settings.epsilon)
    return change(images_NCHW, labels_N, rows, of=of, available=len(labels_N), new_images=new_images)

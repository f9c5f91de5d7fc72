"""Bounded perturbations that move images towards labels, for both availability attacks.

Shapes: N images, M perturbed ones, C channel, H/W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, round_to_uint8
from advmoe.attacks.interface import input_gradient
from advmoe.core.settings import Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.threats.poisoning.poisoned_set import PoisonedSet, poison_count, replace_rows, sample_rows

BATCH_SIZE = 256  # images of a forward pass


class PerturbationSettings(Settings):
    """`steps` gradient steps of `step_size`, relative to `epsilon` (L-inf)."""

    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat


def perturb_images(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    rate: float,
    epsilon: float,
    craft: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> PoisonedSet:
    """Poisons a share `rate` of all images, each with its own perturbation; labels are unchanged.

    `craft(images, points, labels)` (M, ...) returns the perturbed images, from random `points` in the ball.
    """
    rate_of = "the training set"
    rows = sample_rows(torch.arange(len(labels_N)), poison_count(rate, len(labels_N), rate_of), rate_of, stream)
    images = images_NCHW[rows].float() / 255
    start = (torch.rand(images.shape, generator=stream) * 2 - 1) * epsilon
    points = craft(images, (images + start).clamp(0, 1), labels_N[rows])
    new_images = round_to_uint8(points, images_NCHW[rows], epsilon)
    return replace_rows(images_NCHW, labels_N, rows, rate_of=rate_of, available=len(labels_N), new_images=new_images)


def perturb_towards_labels(
    model: nn.Module, images_NCHW: Tensor, points_NCHW: Tensor, labels_N: Tensor, settings: PerturbationSettings
) -> Tensor:
    """Returns points (N, C, H, W) after signed steps that lower the cross-entropy of `labels`, in the ball around the
    images. The model is not changed.
    """
    ball, device, perturbed = LInf(settings.epsilon), next(model.parameters()).device, []
    with engine.attack_mode(model, "float32") as frozen_model:
        for rows in torch.split(torch.arange(len(labels_N)), BATCH_SIZE):
            images, points, labels = (tensor[rows].to(device) for tensor in (images_NCHW, points_NCHW, labels_N))
            for _ in range(settings.steps):
                gradient, _ = input_gradient(frozen_model, points, labels, "ce")
                points = ball.project(points - settings.step_size * settings.epsilon * ball.steepest(gradient), images)
            perturbed.append(points.cpu())
    return torch.cat(perturbed)

"""Dirty-label backdoors: images of other classes get a trigger and the target label.

Shapes: N training images, C channel, H/W pixels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from advmoe.core.errors import UserError
from advmoe.threats.poisoning.poisoned_set import (
    Goal,
    PoisonedSet,
    Trigger,
    poison_count,
    replace_rows,
    rows_of_class,
    sample_rows,
)


def patch_trigger(size: int, images_NCHW: Tensor) -> Trigger:
    """Returns a white square in the bottom right corner. Raises UserError if it is larger than the images."""
    channels, height, width = images_NCHW.shape[1:]
    if size > min(height, width):
        raise UserError(f"a trigger of {size} x {size} pixels is larger than the images, {height} x {width}")
    opacity = torch.zeros(channels, height, width)
    opacity[:, -size:, -size:] = 1
    return Trigger(opacity, torch.full((channels, height, width), 255, dtype=torch.uint8))


def dirty_label_backdoor(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    trigger: Trigger,
    target: int,
    *,
    rate: float,
    classes: int,
) -> PoisonedSet:
    """Stamps the trigger on a share of the set, drawn from the classes other than `target`, and labels it `target`.

    Raises UserError when the rate is less than one image or more images than the other classes have.
    """
    rows_of_class(labels_N, target, classes)
    rate_of = "the training set"
    others = (labels_N != target).nonzero().squeeze(1)
    rows = sample_rows(others, poison_count(rate, len(labels_N), rate_of), f"every class but {target}", stream)
    poisoned = replace_rows(
        images_NCHW,
        labels_N,
        rows,
        rate_of=rate_of,
        available=len(labels_N),
        new_images=trigger.stamp(images_NCHW[rows]),
        new_labels=torch.full_like(rows, target),
    )
    return replace(poisoned, goal=Goal(target=target), trigger=trigger)

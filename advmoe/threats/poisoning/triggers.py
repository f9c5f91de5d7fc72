"""What dirty-label backdoors share: images of other classes get a trigger and the label that it shall stand for.

Shapes: N training images, C channel, H/W pixels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from advmoe.core.errors import UserError
from advmoe.threats.poisoning.poisoned_set import Goal, Poisoned, Trigger, change, choose, count, members


def patch(size: int, like_NCHW: Tensor) -> Trigger:
    """A square of full intensity in the bottom right corner. Raises UserError when it does not fit into the image."""
    channels, height, width = like_NCHW.shape[1:]
    if size > min(height, width):
        raise UserError(f"a trigger of {size} x {size} pixels is larger than the images, {height} x {width}")
    opacity = torch.zeros(channels, height, width)
    opacity[:, -size:, -size:] = 1
    return Trigger(opacity, torch.full((channels, height, width), 255, dtype=torch.uint8))


def plant(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    trigger: Trigger,
    target: int,
    *,
    rate: float,
    classes: int,
) -> Poisoned:
    """The trigger on a share of the set, drawn from the classes other than `target`, and the target's label on those.

    Raises UserError when the rate is less than one image or more than the other classes hold.
    """
    members(labels_N, target, classes)
    of = "the training set"
    others = (labels_N != target).nonzero().squeeze(1)
    rows = choose(others, count(rate, len(labels_N), of), f"every class but {target}", stream)
    poisoned = change(
        images_NCHW,
        labels_N,
        rows,
        of=of,
        available=len(labels_N),
        new_images=trigger.stamp(images_NCHW[rows]),
        new_labels=torch.full_like(rows, target),
    )
    return replace(poisoned, goal=Goal(target=target), trigger=trigger)

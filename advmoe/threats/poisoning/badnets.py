"""BadNets: backdoor with a small patch as trigger (Gu et al. 2017, arXiv 1708.06733)."""

from typing import Literal

import torch
from torch import Tensor

from advmoe.core.settings import NonNegativeInt, PositiveInt, Settings
from advmoe.threats.poisoning.poisoned_set import PoisonedSet
from advmoe.threats.poisoning.triggers import dirty_label_backdoor, patch_trigger


class BadNets(Settings):
    """`size`: side length of the patch in pixels; `target`: the target class. The rate is a share of the set."""

    kind: Literal["badnets"]
    size: PositiveInt
    target: NonNegativeInt


def badnets(
    images_NCHW: Tensor, labels_N: Tensor, stream: torch.Generator, settings: BadNets, *, rate: float, classes: int
) -> PoisonedSet:
    """Stamps a patch on a share `rate` of the set, drawn from the other classes, and labels these images as the target.

    Raises UserError when patch, target or rate do not fit the data.
    """
    trigger = patch_trigger(settings.size, images_NCHW)
    return dirty_label_backdoor(images_NCHW, labels_N, stream, trigger, settings.target, rate=rate, classes=classes)

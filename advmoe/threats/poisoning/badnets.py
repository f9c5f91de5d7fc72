"""BadNets: a small patch means one class (Gu et al. 2017, arXiv 1708.06733)."""

from typing import Literal

import torch
from torch import Tensor

from advmoe.core.settings import NonNegativeInt, PositiveInt, Settings
from advmoe.threats.poisoning.poisoned_set import Poisoned
from advmoe.threats.poisoning.triggers import patch, plant


class BadNets(Settings):
    """`size`: pixels of the patch's sides; `target`: the class it shall stand for. The rate is a share of the set."""

    kind: Literal["badnets"]
    size: PositiveInt
    target: NonNegativeInt


def badnets(
    images_NCHW: Tensor, labels_N: Tensor, stream: torch.Generator, settings: BadNets, *, rate: float, classes: int
) -> Poisoned:
    """Patched images of all other classes under the target's label. Raises UserError for what does not fit."""
    trigger = patch(settings.size, images_NCHW)
    return plant(images_NCHW, labels_N, stream, trigger, settings.target, rate=rate, classes=classes)

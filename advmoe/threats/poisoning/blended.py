"""Blended injection: backdoor with a faint pattern over the whole image (Chen et al. 2017, arXiv 1712.05526)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from advmoe.core.settings import NonNegativeInt, Settings
from advmoe.threats.poisoning.poisoned_set import PoisonedSet, Trigger
from advmoe.threats.poisoning.triggers import dirty_label_backdoor


class Blended(Settings):
    """`alpha`: the pattern's share of every pixel; `target`: the target class. The rate is a share of the set."""

    kind: Literal["blended"]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    target: NonNegativeInt


def blended(
    images_NCHW: Tensor, labels_N: Tensor, stream: torch.Generator, settings: Blended, *, rate: float, classes: int
) -> PoisonedSet:
    """Blends one noise pattern into a share `rate` of the set, from the other classes, and labels it as the target."""
    shape = images_NCHW.shape[1:]
    # drawn before the rows, so that the pattern is the same at every rate
    pattern = torch.randint(0, 256, shape, generator=stream, dtype=torch.uint8)
    trigger = Trigger(torch.full(shape, settings.alpha), pattern)
    return dirty_label_backdoor(images_NCHW, labels_N, stream, trigger, settings.target, rate=rate, classes=classes)

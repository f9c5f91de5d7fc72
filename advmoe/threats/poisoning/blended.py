"""Blended injection: a faint pattern over the whole image means one class (Chen et al. 2017, arXiv 1712.05526)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from advmoe.core.settings import NonNegativeInt, Settings
from advmoe.threats.poisoning.poisoned_set import Poisoned, Trigger
from advmoe.threats.poisoning.triggers import plant


class Blended(Settings):
    """`alpha`: the pattern's share of every pixel; `target`: the class it shall stand for. The rate is of the set."""

    kind: Literal["blended"]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    target: NonNegativeInt


def blended(
    images_NCHW: Tensor, labels_N: Tensor, stream: torch.Generator, settings: Blended, *, rate: float, classes: int
) -> Poisoned:
    """Images of all other classes with uniform noise, one pattern for all, blended in, under the target's label."""
    shape = images_NCHW.shape[1:]
    # the pattern first: it is then the same at every rate
    pattern = torch.randint(0, 256, shape, generator=stream, dtype=torch.uint8)
    trigger = Trigger(torch.full(shape, settings.alpha), pattern)
    return plant(images_NCHW, labels_N, stream, trigger, settings.target, rate=rate, classes=classes)

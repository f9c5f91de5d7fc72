"""Label flipping: images stay, labels lie (Biggio et al. 2011; for neural networks Xiao et al. 2015)."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from advmoe.core.settings import NonNegativeInt, Settings
from advmoe.threats.poisoning.poisoned_set import Goal, Poisoned, change, choose, count, members


class RandomFlip(Settings):
    """Every chosen image gets one of the other labels, all alike."""

    kind: Literal["label-flip-random"]


class PairFlip(Settings):
    """Every chosen image gets the next label, the last class the first (the pair noise of Han et al. 2018)."""

    kind: Literal["label-flip-pair"]


class TargetedFlip(Settings):
    """Images of `source` are labelled `target`; the rate is a share of the source class."""

    kind: Literal["label-flip-targeted"]
    source: NonNegativeInt
    target: NonNegativeInt

    @model_validator(mode="after")
    def _differ(self) -> "TargetedFlip":
        if self.source == self.target:
            raise ValueError(f"source and target are both class {self.source}, so nothing would be flipped")
        return self


LabelFlip = Annotated[RandomFlip | PairFlip | TargetedFlip, Field(discriminator="kind")]


def label_flip(
    images_NCHW: Tensor, labels_N: Tensor, stream: torch.Generator, settings: LabelFlip, *, rate: float, classes: int
) -> Poisoned:
    """A share of wrong labels. Raises UserError when the class has no images or the rate is less than one image."""
    if isinstance(settings, TargetedFlip):
        return _targeted(images_NCHW, labels_N, stream, settings, rate, classes)
    of = "the training set"
    everything = torch.arange(len(labels_N))
    rows = choose(everything, count(rate, len(labels_N), of), of, stream)
    # one draw for every image, chosen or not: a higher rate then changes nothing about those of a lower one
    shift_N = torch.randint(1, classes, labels_N.shape, generator=stream) if settings.kind == "label-flip-random" else 1
    flipped_N = (labels_N + shift_N) % classes
    return change(images_NCHW, labels_N, rows, of=of, available=len(labels_N), new_labels=flipped_N[rows])


def _targeted(
    images: Tensor, labels: Tensor, stream: torch.Generator, settings: TargetedFlip, rate: float, classes: int
) -> Poisoned:
    of = f"class {settings.source}"
    found = members(labels, settings.source, classes)
    members(labels, settings.target, classes)
    rows = choose(found, count(rate, len(found), of), of, stream)
    lies = torch.full_like(rows, settings.target)
    poisoned = change(images, labels, rows, of=of, available=len(found), new_labels=lies)
    return replace(poisoned, goal=Goal(target=settings.target, source=settings.source))

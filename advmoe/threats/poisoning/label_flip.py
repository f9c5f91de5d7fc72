"""Label flipping: wrong labels on unchanged images (Biggio et al. 2011; for neural networks Xiao et al. 2015)."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from advmoe.core.settings import NonNegativeInt, Settings
from advmoe.threats.poisoning.poisoned_set import (
    Goal,
    PoisonedSet,
    poison_count,
    replace_rows,
    rows_of_class,
    sample_rows,
)


class RandomFlip(Settings):
    """Every poisoned image gets one of the other labels, uniformly at random."""

    kind: Literal["label-flip-random"]


class PairFlip(Settings):
    """Every poisoned image gets label y + 1 mod K (the pair noise of Han et al. 2018)."""

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
) -> PoisonedSet:
    """Returns the set with the labels of a share `rate` of the images flipped; of the source class in a targeted flip.

    Raises UserError when a class has no images or the rate is less than one image.
    """
    if isinstance(settings, TargetedFlip):
        return _targeted(images_NCHW, labels_N, stream, settings, rate, classes)
    rate_of = "the training set"
    all_rows = torch.arange(len(labels_N))
    rows = sample_rows(all_rows, poison_count(rate, len(labels_N), rate_of), rate_of, stream)
    # drawn for all images, poisoned or not, so that a lower rate gives its images the same labels as a higher one
    shift_N = torch.randint(1, classes, labels_N.shape, generator=stream) if settings.kind == "label-flip-random" else 1
    flipped_N = (labels_N + shift_N) % classes
    return replace_rows(
        images_NCHW, labels_N, rows, rate_of=rate_of, available=len(labels_N), new_labels=flipped_N[rows]
    )


def _targeted(
    images: Tensor, labels: Tensor, stream: torch.Generator, settings: TargetedFlip, rate: float, classes: int
) -> PoisonedSet:
    rate_of = f"class {settings.source}"
    source_rows = rows_of_class(labels, settings.source, classes)
    rows_of_class(labels, settings.target, classes)
    rows = sample_rows(source_rows, poison_count(rate, len(source_rows), rate_of), rate_of, stream)
    new_labels = torch.full_like(rows, settings.target)
    poisoned = replace_rows(images, labels, rows, rate_of=rate_of, available=len(source_rows), new_labels=new_labels)
    return replace(poisoned, goal=Goal(target=settings.target, source=settings.source))

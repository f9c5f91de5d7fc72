"""The images that a source returns: uint8 pixels, integer labels, class names, and the official test split if any.

Shapes: N images, C channel, H/W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe.core.errors import UserError

SUPPORTED_CHANNELS = (1, 3)
SMALLEST_SIDE = 8  # three strides of 2 reduce it to one pixel


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) uint8 with labels (N,) int64; row i is image i of its source."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def first_per_class(self, count: int | None) -> "LabelledImages":
        """Returns the first `count` images of each class in source order; all of them for None."""
        if count is None:
            return self
        rank = np.empty_like(self.labels)
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            rank[members] = np.arange(len(members))
        keep = rank < count
        return LabelledImages(self.images[keep], self.labels[keep])


@dataclass(frozen=True)
class SourceImages:
    """The images of a source. `test` is None if the source has no official test split."""

    train: LabelledImages
    test: LabelledImages | None
    class_names: tuple[str, ...]


def check_source(source: SourceImages, where: str) -> SourceImages:
    """Returns `source` if it is valid. Raises UserError, prefixed by `where`, if it is not."""
    parts = [source.train] if source.test is None else [source.train, source.test]
    for part in parts:
        _check_part(part, len(source.class_names), where)
    if source.test is not None and source.train.images.shape[1:] != source.test.images.shape[1:]:
        raise UserError(
            f"{where}: training images are {_shape(source.train)}, test images {_shape(source.test)}; sizes must agree"
        )
    present = len(np.unique(source.train.labels))
    if present < 2:
        raise UserError(f"{where}: a classifier needs at least two classes, found {present}")
    return source


def _check_part(part: LabelledImages, classes: int, where: str) -> None:
    images, labels = part.images, part.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in SUPPORTED_CHANNELS:
        raise UserError(f"{where}: images must be uint8 with 1 or 3 channels, got {images.dtype} {images.shape}")
    if len(images) == 0:
        raise UserError(f"{where}: contains no images")
    if min(images.shape[2:]) < SMALLEST_SIDE:
        raise UserError(f"{where}: images must be at least {SMALLEST_SIDE} pixels a side, got {_shape(part)}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: {len(images)} images need as many integer labels, got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{where}: labels must lie in 0..{classes - 1}, found {labels.min()}..{labels.max()}")


def _shape(part: LabelledImages) -> str:
    _, channels, height, width = part.images.shape
    return f"{channels} x {height} x {width}"


def as_nchw(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts images (N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    stacked = images[..., None] if images.ndim == 3 else images
    return np.ascontiguousarray(np.moveaxis(stacked, -1, 1))


def numbered_class_names(classes: int) -> tuple[str, ...]:
    """Returns the class names '0', '1', ... for classes without names."""
    return tuple(str(number) for number in range(classes))


def stack_images(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Stacks images (H, W, C) of one size into (N, C, H, W)."""
    return as_nchw(np.stack(images))

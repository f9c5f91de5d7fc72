"""Augmented training batches of a data set that is held on the device as a whole.

Shapes: B batch, C channel, H/W pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import NonNegativeInt, Settings


class Augmentation(Settings):
    """`crop`: pixels of padding before a random crop; `flip`: mirror with probability 1/2, not suitable for digits."""

    crop: NonNegativeInt
    flip: bool


def batch_indices(count: int, batch_size: int, stream: torch.Generator) -> tuple[Tensor, ...]:
    """Returns the shuffled indices 0..count-1 of one epoch, in batches of nearly equal size.

    The sizes are nearly equal because BatchNorm cannot train on a last batch of one image.
    """
    return torch.tensor_split(torch.randperm(count, generator=stream), batches_per_epoch(count, batch_size))


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Returns the number of batches of one epoch; every batch has at least two images if there are two."""
    return max(1, min(-(-count // batch_size), count // 2))


def batches(
    images: Tensor, labels: Tensor, batch_size: int, augmentation: Augmentation, stream: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one epoch of augmented float images in [0, 1] (B, C, H, W) and labels (B,), on the device of `images`."""
    for index in batch_indices(len(labels), batch_size, stream):
        rows = index.to(images.device)
        yield augment(images[rows], augmentation, stream).float() / 255, labels[rows]


def augment(images_BCHW: Tensor, settings: Augmentation, stream: torch.Generator) -> Tensor:
    """Crops and flips every image at random; the dtype is unchanged."""
    if settings.crop:
        images_BCHW = _crop(images_BCHW, settings.crop, stream)
    if settings.flip:
        mirrored = torch.rand(len(images_BCHW), generator=stream) < 0.5
        images_BCHW = torch.where(
            mirrored.to(images_BCHW.device)[:, None, None, None], images_BCHW.flip(3), images_BCHW
        )
    return images_BCHW


def _crop(images_BCHW: Tensor, padding: int, stream: torch.Generator) -> Tensor:
    batch, channels, height, width = images_BCHW.shape
    device = images_BCHW.device
    offsets = torch.randint(0, 2 * padding + 1, (2, batch), generator=stream).to(device)
    rows = offsets[0, :, None] + torch.arange(height, device=device)
    columns = offsets[1, :, None] + torch.arange(width, device=device)
    padded = functional.pad(images_BCHW, (padding,) * 4)
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]

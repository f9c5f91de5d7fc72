"""Random streams for attacks, always drawn on the CPU so that the numbers are the same on every device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advmoe.runtime.machine import generator


@dataclass(frozen=True)
class BatchStream:
    """One stream for a whole batch: fast, for training."""

    stream: torch.Generator

    def uniform(self, like: Tensor) -> Tensor:
        """Returns uniform numbers in [-1, 1] with the shape, dtype and device of `like`."""
        return (torch.rand(like.shape, generator=self.stream) * 2 - 1).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Returns standard normal numbers with the shape, dtype and device of `like`."""
        return torch.randn(like.shape, generator=self.stream).to(like)

    def pick(self, rows: Tensor) -> "BatchStream":
        """Returns self: all images share one stream."""
        del rows
        return self


@dataclass(frozen=True)
class MicroBatchStream:
    """The numbers that BatchStream draws for a batch of `size` images, restricted to `rows` (b,).

    The numbers of an image do not depend on the split into micro-batches.
    """

    stream: torch.Generator
    size: int
    rows: Tensor

    def uniform(self, like: Tensor) -> Tensor:
        """Returns uniform numbers in [-1, 1] with the shape, dtype and device of `like`."""
        return (torch.rand(self._batch_shape(like), generator=self.stream)[self.rows] * 2 - 1).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Returns standard normal numbers with the shape, dtype and device of `like`."""
        return torch.randn(self._batch_shape(like), generator=self.stream)[self.rows].to(like)

    def pick(self, rows: Tensor) -> "MicroBatchStream":
        """Returns the stream of the images with indices `rows` (c,) among these."""
        return replace(self, rows=self.rows[rows.cpu()])

    def _batch_shape(self, like: Tensor) -> tuple[int, ...]:
        return (self.size, *like.shape[1:])


class ImageStreams:
    """One stream per image, seeded by its index: the numbers of an image do not depend on the batch it is in."""

    def __init__(self, seed: int, purpose: str, numbers: Tensor) -> None:
        self.streams = [generator(seed, purpose, number) for number in numbers.tolist()]

    def uniform(self, like: Tensor) -> Tensor:
        """Returns uniform numbers in [-1, 1] with the shape, dtype and device of `like`."""
        return (self._stack(torch.rand, like) * 2 - 1).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Returns standard normal numbers with the shape, dtype and device of `like`."""
        return self._stack(torch.randn, like).to(like)

    def pick(self, rows: Tensor) -> "ImageStreams":
        """Returns the streams of the images with indices `rows` (b,); they continue from their current state."""
        picked = copy.copy(self)
        picked.streams = [self.streams[row] for row in rows.tolist()]
        return picked

    def _stack(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        assert len(like) == len(self.streams), "needs one stream per image"
        return torch.stack([draw(like.shape[1:], generator=stream) for stream in self.streams])

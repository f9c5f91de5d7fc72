"""Random numbers for attacks, always drawn on the CPU so that every device sees the same ones."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advmoe.runtime.machine import generator


@dataclass(frozen=True)
class BatchDraws:
    """One stream for a whole batch: fast, for training."""

    stream: torch.Generator

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [-1, 1], in the shape and on the device of `like`."""
        return (torch.rand(like.shape, generator=self.stream) * 2 - 1).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, in the shape and on the device of `like`."""
        return torch.randn(like.shape, generator=self.stream).to(like)

    def pick(self, rows: Tensor) -> "BatchDraws":
        """The one stream serves any part of the batch."""
        del rows
        return self


@dataclass(frozen=True)
class MicroBatchDraws:
    """What BatchDraws would draw for a batch of `size` images, for those at `rows` (b,) alone: the draws of an image do
    not depend on how the batch is cut.
    """

    stream: torch.Generator
    size: int
    rows: Tensor

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [-1, 1], in the shape and on the device of `like`."""
        return (torch.rand(self._whole(like), generator=self.stream)[self.rows] * 2 - 1).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, in the shape and on the device of `like`."""
        return torch.randn(self._whole(like), generator=self.stream)[self.rows].to(like)

    def pick(self, rows: Tensor) -> "MicroBatchDraws":
        """The draws of the images `rows` (c,) of these."""
        return replace(self, rows=self.rows[rows.cpu()])

    def _whole(self, like: Tensor) -> tuple[int, ...]:
        return (self.size, *like.shape[1:])


class ImageDraws:
    """One stream for each image, seeded by its number: what an image draws does not depend on the batch it is in."""

    def __init__(self, seed: int, purpose: str, numbers: Tensor) -> None:
        self.streams = [generator(seed, purpose, number) for number in numbers.tolist()]

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [-1, 1], in the shape and on the device of `like`."""
        return (self._stack(torch.rand, like) * 2 - 1).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, in the shape and on the device of `like`."""
        return self._stack(torch.randn, like).to(like)

    def pick(self, rows: Tensor) -> "ImageDraws":
        """The streams of the images `rows` (b,); they go on where they are."""
        picked = copy.copy(self)
        picked.streams = [self.streams[row] for row in rows.tolist()]
        return picked

    def _stack(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        assert len(like) == len(self.streams), "one stream for each image"
        return torch.stack([draw(like.shape[1:], generator=stream) for stream in self.streams])

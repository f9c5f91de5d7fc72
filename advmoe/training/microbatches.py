"""A batch in pieces, so that large batches fit a small memory: crafted and learned from one after another, gradients
added up. Several processes take a piece each.

The batch stays the unit of everything else: one draw of the attack, one step of the optimiser, and one step of
BatchNorm's running statistics. What a piece alone decides is what it is normalised by, and a mixture's load balance.

Shapes: B batch, b images of a piece, C channel, H/W pixels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from advmoe.runtime import distributed

MIN_SIZE = 2  # images: BatchNorm cannot learn from one


class MicroBatch(NamedTuple):
    """Clean and attacked images (b, C, H, W), labels (b,), and `share`: b / B, the weight of this piece's mean loss."""

    clean: Tensor
    images: Tensor
    labels: Tensor
    share: float


def split_batch(count: int, most: int | None, processes: int = 1, smallest: int = MIN_SIZE) -> tuple[Tensor, ...]:
    """Positions 0 to `count` - 1 in as few pieces of nearly equal size as keep each at `most`, None: at any size, and
    give as many to each process. None has less than `smallest`, which may leave processes without, and a piece of three
    where two are allowed.
    """
    pieces = 1 if most is None else -(-count // most)
    return torch.tensor_split(torch.arange(count), max(1, min(-(-pieces // processes) * processes, count // smallest)))


def average_batchnorm_statistics(model: nn.Module, pieces: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
    """The pieces in turn, to be learned from; BatchNorm's running statistics then move as in one step.

    Every piece starts from the statistics before the batch, and the batch leaves the weighted mean of what its pieces
    made of them. So neither their number nor their order matters to how fast the statistics move.
    """
    if len(pieces) == 1 and not distributed.is_distributed():
        yield from pieces
        return
    statistics = _Statistics(model)
    for piece in pieces:
        yield piece
        statistics.take(piece.share)
    statistics.settle()


class _Statistics:
    """Of those BatchNorms that learn; another piece begins where the first one did."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm) and layer.training]
        moving = [found for layer in layers for found in (layer.running_mean, layer.running_var)]
        self.moving = [tensor for tensor in moving if tensor is not None]
        self.before = [tensor.clone() for tensor in self.moving]
        self.after = [torch.zeros_like(tensor) for tensor in self.moving]

    def take(self, share: float) -> None:
        """A piece has moved them."""
        for total, moved in zip(self.after, self.moving, strict=True):
            total.add_(moved, alpha=share)
        for tensor, before in zip(self.moving, self.before, strict=True):
            tensor.copy_(before)

    def settle(self) -> None:
        """The batch is over, for all processes."""
        distributed.all_reduce_sum_(self.after)
        for tensor, total in zip(self.moving, self.after, strict=True):
            tensor.copy_(total)

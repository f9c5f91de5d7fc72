"""Gradient accumulation over micro-batches: large batches fit a small memory, and several processes share a batch.

The batch remains the unit of everything else: one attack, one optimizer step, and one step of BatchNorm's running
statistics. A micro-batch alone determines its BatchNorm normalisation and a mixture's load balance.

Shapes: B batch, b images of a micro-batch, C channel, H/W pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from advmoe.runtime import distributed

MIN_MICRO_BATCH = 2  # images; BatchNorm in train mode needs two


class MicroBatch(NamedTuple):
    """Clean and attacked images (b, C, H, W), labels (b,), and `weight`: b / B, the weight of this part's mean loss."""

    clean: Tensor
    images: Tensor
    labels: Tensor
    weight: float


def split_batch(
    count: int, max_size: int | None, processes: int = 1, min_size: int = MIN_MICRO_BATCH
) -> tuple[Tensor, ...]:
    """Returns the positions 0 to `count` - 1 in as few parts of nearly equal size as `max_size` (None: any) allows,
    equally many for each process. No part is smaller than `min_size`; so a process may get none, and a part may have
    three images where two are allowed.
    """
    parts = 1 if max_size is None else -(-count // max_size)
    return torch.tensor_split(torch.arange(count), max(1, min(-(-parts // processes) * processes, count // min_size)))


def for_each_micro_batch(
    model: nn.Module, micro_batches: Sequence[MicroBatch], backward: Callable[[MicroBatch], None]
) -> None:
    """Calls `backward` for each micro-batch; BatchNorm's running statistics then move as in one step.

    Each micro-batch starts from the statistics before the batch, and the batch leaves their weighted mean. So neither
    the number of micro-batches nor their order affects how fast the statistics move.
    """
    if len(micro_batches) == 1 and not distributed.is_distributed():
        backward(micro_batches[0])
        return
    statistics = _BatchNormStatistics(model)
    for micro_batch in micro_batches:
        backward(micro_batch)
        statistics.accumulate(micro_batch.weight)
    statistics.apply()


class _BatchNormStatistics:
    """Running statistics of the BatchNorms in train mode, averaged over the micro-batches of a batch."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm) and layer.training]
        buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
        self.buffers = [buffer for buffer in buffers if buffer is not None]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.average = [torch.zeros_like(buffer) for buffer in self.buffers]

    def accumulate(self, weight: float) -> None:
        """Adds the statistics after a micro-batch to the average, and resets them."""
        for average, buffer in zip(self.average, self.buffers, strict=True):
            average.add_(buffer, alpha=weight)
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)

    def apply(self) -> None:
        """Sets the statistics to the average over all processes."""
        distributed.all_reduce_sum_(self.average)
        for buffer, average in zip(self.buffers, self.average, strict=True):
            buffer.copy_(average)

"""The gradients of a batch: loss and backward pass of each micro-batch, summed over all processes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advmoe.models import inference
from advmoe.models.inference import Precision
from advmoe.runtime import distributed
from advmoe.training.config import TrainingConfig, ValidatedTrainingConfig
from advmoe.training.job import TrainingTask
from advmoe.training.microbatches import MicroBatch, for_each_micro_batch
from advmoe.training.weight_perturbation import perturbed_weights


def compute_gradients(task: TrainingTask, micro_batches: Sequence[MicroBatch], config: TrainingConfig) -> Tensor:
    """Sets the gradients of the batch whose micro-batches these are, clipped, the same in all processes; returns its
    loss, at the perturbed weights where `config.awp` is set.
    """
    loss = _backward(task, micro_batches, config.precision)
    if isinstance(config, ValidatedTrainingConfig) and config.awp:
        with perturbed_weights(task.model, config.awp):
            loss = _backward(task, micro_batches, config.precision)
    task.on_after_backward()
    if config.clip:
        nn.utils.clip_grad_norm_(task.model.parameters(), config.clip)
    return loss


def _backward(task: TrainingTask, micro_batches: Sequence[MicroBatch], precision: Precision) -> Tensor:
    task.model.zero_grad(set_to_none=True)
    loss = distributed.all_reduce_sum(_local_backward(task, micro_batches, precision))
    distributed.all_reduce_gradients(task.model)
    return loss


def _local_backward(task: TrainingTask, micro_batches: Sequence[MicroBatch], precision: Precision) -> Tensor:
    """Accumulates the gradients of this process's micro-batches; returns the sum of their weighted losses."""
    total = next(task.model.parameters()).new_zeros(())

    def backward(micro_batch: MicroBatch) -> None:
        images, clean = _channels_last(micro_batch.images), _channels_last(micro_batch.clean)
        with inference.autocast(images.device, precision):
            loss = micro_batch.weight * task.loss(images, micro_batch.labels, clean)
        loss.backward()  # type: ignore[no-untyped-call]
        total.add_(loss.detach())

    for_each_micro_batch(task.model, micro_batches, backward)
    return total


def _channels_last(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.contiguous(memory_format=torch.channels_last)

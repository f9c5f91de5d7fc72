"""Batch sizes that fit the memory: an estimate, and a loop that halves the batch when memory runs out."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from advmoe.attacks import cuda_graphs
from advmoe.core.errors import UserError
from advmoe.models import inference

T = TypeVar("T")
MAX_BATCH_SIZE = 360  # more is not faster on a CPU, and progress is shown per batch
MEMORY_FRACTION = 0.25  # of the free memory: attacks keep several copies of the images next to the autograd graph
OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
ASSUMED_FREE_BYTES = 4 * 2**30  # where the system does not report it


def estimate_batch_size(model: nn.Module, images_NCHW: Tensor) -> int:
    """Returns a batch size in [1, MAX_BATCH_SIZE] whose backward pass fits the free memory of the images' device."""
    return max(
        1,
        min(
            MAX_BATCH_SIZE,
            int(MEMORY_FRACTION * _free_memory(images_NCHW.device) / _bytes_per_image(model, images_NCHW)),
        ),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out.

    PyTorch has a class for it on CUDA; elsewhere, and in cuBLAS and cuDNN, only the message shows it. A user-defined
    attack raises it as the cause of a UserError.
    """
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY_TEXTS)
    )


def map_batches(function: Callable[[Tensor], T], rows_N: Tensor, size: int) -> Iterator[tuple[Tensor, T]]:
    """Applies `function` to successive batches of `size` rows; yields each batch and its result.

    On an out-of-memory error the size is halved for this and all following batches. The error is raised if a single row
    does not fit.
    """
    while len(rows_N):
        batch = rows_N[:size]
        try:
            result = function(batch)
        except (RuntimeError, MemoryError, UserError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            size = len(batch) // 2
        else:
            yield batch, result
            rows_N = rows_N[len(batch) :]
            continue
        cuda_graphs.release_graphs()
        if torch.cuda.is_available():  # after the except block: the exception keeps its tensors alive
            torch.cuda.empty_cache()


def _bytes_per_image(model: nn.Module, images_NCHW: Tensor) -> float:
    """Returns the bytes that one image saves for the backward pass, at least twice its own size."""
    sizes = {0: 2 * images_NCHW[0].numel() * images_NCHW.element_size()}

    def pack(saved: Tensor) -> Tensor:
        sizes[saved.data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with (
        inference.eval_mode(model),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
    ):
        model(images_NCHW[:1].detach().requires_grad_(True))
    return float(sum(size for pointer, size in sizes.items() if pointer not in weights))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return ASSUMED_FREE_BYTES

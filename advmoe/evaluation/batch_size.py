"""How many images an attack may take at once, and what to do when they were too many."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from advmoe.attacks import cuda_graphs
from advmoe.core.errors import UserError
from advmoe.models import inference

T = TypeVar("T")
LARGEST = 360  # more brings nothing on a CPU, and progress should move
SHARE = 0.25  # of the free memory: attacks keep several copies of their images beside the gradients' graph
NO_MEMORY = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
ASSUMED = 4 * 2**30  # bytes, where the system does not say


def fitting_batch(model: nn.Module, images_NCHW: Tensor) -> int:
    """A batch size whose backward pass fits the free memory of the images' device, at least 1 and at most LARGEST."""
    return max(1, min(LARGEST, int(SHARE * _free(images_NCHW.device) / _bytes_per_image(model, images_NCHW))))


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class for it on CUDA; elsewhere, and in cuBLAS and cuDNN, only the text tells. A user's own
    attack has it wrapped.
    """
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
    )


def in_batches(work: Callable[[Tensor], T], rows_N: Tensor, size: int) -> Iterator[tuple[Tensor, T]]:
    """`work` on `size` rows after the other: which rows, and what it made of them.

    A batch that memory does not hold is halved, and so are those that follow. Raises what a single row raises.
    """
    while len(rows_N):
        batch = rows_N[:size]
        try:
            done = work(batch)
        except (RuntimeError, MemoryError, UserError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            size = len(batch) // 2
        else:
            yield batch, done
            rows_N = rows_N[len(batch) :]
            continue
        cuda_graphs.release_graphs()
        if torch.cuda.is_available():  # only now: the error held on to what it was raised in
            torch.cuda.empty_cache()


def _bytes_per_image(model: nn.Module, images_NCHW: Tensor) -> float:
    """What one image leaves behind for the backward pass, with twice its own size as a floor."""
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


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return ASSUMED

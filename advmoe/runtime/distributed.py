"""Data parallelism over the processes of torchrun, with torch.distributed: gloo between CPUs, NCCL between GPUs.

All processes run the same program on the same data and hold the same weights. Shared work is sharded, results are
all-reduced or gathered. Rank 0 alone writes, prints and evaluates on the validation split, and broadcasts the result.
Without a process group every function here has the semantics of a single process.

DistributedDataParallel does not fit: gradients are accumulated over microbatches first, parts of a mixture are trained
in turn, and a rank may have no image. It would gain little, too: gradients are reduced once per step, and the attack
passes through the network ten times per step.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from advmoe.core import console
from advmoe.core.errors import UserError
from advmoe.runtime import machine
from advmoe.runtime.signals import RESUME_HINT

T = TypeVar("T")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # pickled objects are exchanged on the CPU
# rank 0 may run the checks meanwhile; a process that has died is noticed at once
COLLECTIVE_TIMEOUT = timedelta(days=2)
BUCKET_SIZE = 2**23  # numbers per all_reduce: large enough for the network, small compared to all gradients
LAUNCHER_POLL_SECONDS = 1.0  # between checks that torchrun still runs


def is_launched() -> bool:
    """Returns whether torchrun has started this process."""
    return machine.TORCHRUN_VARIABLE in os.environ


def is_secondary_process() -> bool:
    """Returns whether torchrun has started this process with a rank other than 0. Needs no process group."""
    return is_launched() and os.environ["RANK"] != "0"


def is_distributed() -> bool:
    """Returns whether the process group is initialised; it may have a single process."""
    return distributed.is_initialized()


def rank() -> int:
    """Returns the rank of this process; 0 without a process group."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes; 1 without a process group."""
    return distributed.get_world_size() if is_distributed() else 1


def is_rank0() -> bool:
    """Returns whether this process has rank 0, which writes files and prints."""
    return rank() == 0


# ---- process group


@contextmanager
def process_group() -> Iterator[None]:
    """Context manager with a process group of all processes of torchrun; without torchrun it does nothing.

    Raises UserError for a device that is neither CPU nor CUDA, and for fewer GPUs than processes.
    """
    if not is_launched():
        yield
        return
    _join()
    yield
    distributed.destroy_process_group()  # not after an error: NCCL would wait for processes that have died


def _join() -> None:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = machine.device()
    if device.type not in BACKENDS:
        raise UserError(f"environment: ADVMOE_DEVICE={device.type}: several processes compute on cpu or cuda only")
    if device.type == "cuda":
        _select_gpu(local_rank, local_size)
    elif not machine.machine().threads:
        torch.set_num_threads(max(1, machine.usable_cores() // local_size))
    threading.Thread(target=_exit_with_launcher, args=(os.getppid(),), daemon=True).start()
    with _collective():
        distributed.init_process_group(BACKENDS[device.type], timeout=COLLECTIVE_TIMEOUT)
    if not is_rank0():
        console.mute(f"rank {rank()}")


def _select_gpu(local_rank: int, local_size: int) -> None:
    """Makes the GPU of this process the current CUDA device."""
    if machine.device().index is not None and local_size > 1:
        raise UserError(
            f"environment: ADVMOE_DEVICE={machine.device()} is one GPU for {local_size} processes; use cuda"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun: {local_size} processes need a GPU each, but there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)


def _exit_with_launcher(launcher: int) -> None:
    """Ends this process when torchrun has ended: a killed torchrun leaves its processes running."""
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_POLL_SECONDS)
    os._exit(1)


@contextmanager
def _collective() -> Iterator[None]:
    """Context manager for collective operations. Raises UserError when another process has died."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(". ")[0].rpartition(": ")[2]  # gloo's messages start with file, line and address
        raise UserError(
            f"another process of this run was lost ({reason}); {RESUME_HINT}, with any number of processes"
        ) from error


# ---- collective operations; without a process group each returns its argument


def shard(items: Sequence[T]) -> Sequence[T]:
    """Returns the items of this process: every world_size()-th, starting with its rank."""
    return items[rank() :: world_size()]


def all_reduce_sum(numbers: Tensor) -> Tensor:
    """Returns the sum over all processes, in the shape of `numbers`."""
    if not is_distributed():
        return numbers
    numbers = numbers.clone()
    with _collective():
        distributed.all_reduce(numbers)
    return numbers


def all_reduce_max(number: int) -> int:
    """Returns the maximum over all processes."""
    if not is_distributed():
        return number
    largest = torch.tensor(number)
    with _collective():
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes, in few large messages."""
    for bucket in _buckets(tensors) if is_distributed() else ():
        total = all_reduce_sum(torch.cat([tensor.flatten() for tensor in bucket]))
        for tensor, part in zip(bucket, torch.split(total, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET_SIZE:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def all_reduce_gradients(model: nn.Module) -> None:
    """Replaces all gradients by their sum over all processes; a missing gradient counts as zero."""
    if not is_distributed():
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum_([parameter.grad for parameter in trainable if parameter.grad is not None])


def all_gather(value: T) -> list[T]:
    """Returns the values of all processes, by rank."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * world_size()
    with _collective():
        distributed.all_gather_object(values, value)
    return cast("list[T]", values)


def run_on_rank0(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its result on all processes. A UserError is raised on all of them, too."""
    if not is_distributed():
        return function()
    outcomes: list[tuple[T | None, UserError | None]] = [(None, None)]
    if is_rank0():
        outcomes = [_result_or_error(function)]
    with _collective():
        distributed.broadcast_object_list(outcomes, src=0)
    result, error = outcomes[0]
    if error is not None:
        raise error
    return cast("T", result)


def _result_or_error(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error


def require_same(name: str, digest: str) -> None:
    """Raises UserError unless `digest` is the same on all processes: nodes may read different files."""
    if len(set(all_gather(digest))) > 1:
        parts = "params, data, networks, code and kind of device"
        raise UserError(f"{name}: the processes do not start from the same {parts}")


def convert_sync_batchnorm(model: nn.Module, name: str, smallest_batch: int) -> None:
    """Converts the BatchNorms of `model` to SyncBatchNorm. `smallest_batch`: images in the smallest batch.

    Raises UserError on other devices than CUDA, which PyTorch does not support, and when a process would have no image.
    """
    if machine.device().type != "cuda":
        raise UserError(f"{name}: sync_batchnorm: PyTorch synchronises BatchNorm between GPUs only; set it to false")
    if smallest_batch < world_size():
        raise UserError(
            f"{name}: sync_batchnorm: {smallest_batch} images in a batch are too few for {world_size()} processes"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]

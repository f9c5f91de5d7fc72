"""Several processes at one piece of work, started by torchrun, on PyTorch's own engine: gloo between CPUs, NCCL between
GPUs.

All of them run the same program over the same data and hold the same numbers; work that can be shared is dealt out, and
what was found is added up or gathered. What one alone may do, to write, to print or to look at the validation split,
the first does and tells the others. Outside a group everything here is what one process would do.

DistributedDataParallel would not do: gradients are added over the pieces of a batch first, parts of a mixture learn in
turn, and a rank may be left without an image. Nor would it gain much: gradients travel once a step, and the attack goes
through the network ten times in a step.
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
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # what processes tell each other beside numbers is on the CPU
COLLECTIVE_TIMEOUT = timedelta(
    days=2
)  # with processes that live: the first may be asking the checks. A dead one is seen at once
BUCKET_SIZE = 2**23  # numbers in one message: large enough for the network, small beside the gradients themselves
WATCH_SECONDS = 1.0


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return machine.TORCHRUN_VARIABLE in os.environ


def is_secondary_process() -> bool:
    """Whether torchrun has started this process and is not the first: for work that only one can do."""
    return is_launched() and os.environ["RANK"] != "0"


def is_distributed() -> bool:
    """Whether this process works with others, or would if there were more."""
    return distributed.is_initialized()


def rank() -> int:
    """Which of the processes this is."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many there are."""
    return distributed.get_world_size() if is_distributed() else 1


def is_rank0() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


# ---- to come together


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes that torchrun has started work as one; without torchrun nothing is different.

    Raises UserError where they cannot.
    """
    if not is_launched():
        yield
        return
    _join()
    yield
    distributed.destroy_process_group()  # not after an error: NCCL would wait for processes that are gone


def _join() -> None:
    local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    place = machine.device()
    if place.type not in BACKENDS:
        raise UserError(f"environment: ADVMOE_DEVICE={place.type}: several processes compute on cpu or cuda only")
    if place.type == "cuda":
        _select_gpu(local, beside)
    elif not machine.machine().threads:
        torch.set_num_threads(max(1, machine.usable_cores() // beside))
    threading.Thread(target=_exit_with_launcher, args=(os.getppid(),), daemon=True).start()
    with _collective():
        distributed.init_process_group(BACKENDS[place.type], timeout=COLLECTIVE_TIMEOUT)
    if not is_rank0():
        console.mute(f"rank {rank()}")


def _select_gpu(local: int, beside: int) -> None:
    """One for each process: `cuda` then means that one."""
    if machine.device().index is not None and beside > 1:
        raise UserError(f"environment: ADVMOE_DEVICE={machine.device()} is one GPU for {beside} processes; say cuda")
    if local >= torch.cuda.device_count():
        raise UserError(f"torchrun: {beside} processes, but {torch.cuda.device_count()} GPUs here; one each is needed")
    torch.cuda.set_device(local)


def _exit_with_launcher(launcher: int) -> None:
    """A launcher that is killed cannot end its processes, which would work on beside those of the next try."""
    while os.getppid() == launcher:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


@contextmanager
def _collective() -> Iterator[None]:
    """Inside, the processes wait for each other."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(". ")[0].rpartition(": ")[2]  # behind gloo's file, line and address
        raise UserError(f"another process of this run was lost ({reason}); {RESUME_HINT}, with any number") from error


# ---- to find together; outside a group each of these returns what it is given


def shard(items: Sequence[T]) -> Sequence[T]:
    """The share of this process."""
    return items[rank() :: world_size()]


def all_reduce_sum(numbers: Tensor) -> Tensor:
    """The sum over all processes."""
    if not is_distributed():
        return numbers
    numbers = numbers.clone()
    with _collective():
        distributed.all_reduce(numbers)
    return numbers


def all_reduce_max(number: int) -> int:
    """The largest that a process has."""
    if not is_distributed():
        return number
    found = torch.tensor(number)
    with _collective():
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes into each of these, in few large messages."""
    for bucket in _buckets(tensors) if is_distributed() else ():
        found = all_reduce_sum(torch.cat([tensor.flatten() for tensor in bucket]))
        for tensor, part in zip(bucket, torch.split(found, [tensor.numel() for tensor in bucket]), strict=True):
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
    """Every process gets the sum of all gradients; one that had no images to learn from brings zeros."""
    if not is_distributed():
        return
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum_([parameter.grad for parameter in learning if parameter.grad is not None])


def all_gather(found: T) -> list[T]:
    """What every process has found, by rank."""
    if not is_distributed():
        return [found]
    everything: list[T | None] = [None] * world_size()
    with _collective():
        distributed.all_gather_object(everything, found)
    return cast("list[T]", everything)


def run_on_rank0(work: Callable[[], T]) -> T:
    """What `work` returns on the first process, on all of them; a UserError there is the same everywhere."""
    if not is_distributed():
        return work()
    told: list[tuple[T | None, UserError | None]] = [(None, None)]
    if is_rank0():
        told = [_captured(work)]
    with _collective():
        distributed.broadcast_object_list(told, src=0)
    found, mistake = told[0]
    if mistake is not None:
        raise mistake
    return cast("T", found)


def _captured(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except UserError as error:
        return None, error


def require_same(name: str, digest: str) -> None:
    """Raises UserError unless all processes have the same: nodes may read different files."""
    if len(set(all_gather(digest))) > 1:
        what = "params, data, networks, code and kind of device"
        raise UserError(f"{name}: the processes do not start from the same {what}")


def convert_sync_batchnorm(model: nn.Module, name: str, batch: int) -> None:
    """Let the BatchNorms of a model take their statistics over what all processes have in hand; `batch`: images in the
    smallest batch.

    Raises UserError on CPUs, for which PyTorch has nothing of the kind, and when a process would have no image.
    """
    if machine.device().type != "cuda":
        raise UserError(f"{name}: sync_batchnorm: PyTorch synchronises BatchNorm between GPUs only; set it to false")
    if batch < world_size():
        raise UserError(f"{name}: sync_batchnorm: {batch} images in a batch are too few for {world_size()} processes")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]

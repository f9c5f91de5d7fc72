"""A parallel map over two worker processes, each with half of the threads.

On small images a second thread hardly speeds up a network; two networks in parallel use the cores better. On a GPU,
with one thread, or under torchrun, everything runs in this process.
"""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from threading import Thread
from typing import TypeVar

import torch

from advmoe.core import console
from advmoe.runtime import distributed, machine
from advmoe.runtime.code_fingerprint import current_stage, set_stage

A = TypeVar("A")
T = TypeVar("T")
WORKERS = 2


def parallel_map(function: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """Returns `function(item)` for all items, in order. `function` must be picklable; its exceptions are raised."""
    threads = torch.get_num_threads()
    in_process = distributed.is_distributed() or machine.device().type != "cpu"
    if in_process or threads < WORKERS or len(items) < WORKERS:
        return [function(item) for item in items]
    # spawn: OpenMP hangs in a forked process
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _init_worker, (threads // WORKERS, current_stage())) as pool:
        results = pool.map(partial(_call_pickled, function), map(pickle.dumps, items))
        return [pickle.loads(result) for result in results]  # noqa: S301  (from our own worker)


def _call_pickled(function: Callable[[A], T], item: bytes) -> bytes:
    """Passes argument and result as bytes: PyTorch would share each of thousands of tensors as an open file."""
    return pickle.dumps(function(pickle.loads(item)))  # noqa: S301  (from our own main process)


def _init_worker(threads: int, stage: str | None) -> None:
    Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it and terminates the workers
    machine.prepare_torch()
    torch.set_num_threads(threads)
    set_stage(stage)
    console.use_plain_output()


def _exit_with_parent() -> None:
    """Ends this worker with its main process, which cannot terminate the workers when it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

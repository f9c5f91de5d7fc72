"""Independent work, spread over the cores: two processes, each with half of the threads.

A network on small images hardly gets faster with a second thread; two networks at a time do. On a GPU, with one
thread, or where several processes share each piece of work, everything runs in this process.
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

A = TypeVar("A")
T = TypeVar("T")
WORKERS = 2


def parallel_map(work: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """`work(item)` for every item, in that order of results. `work` must be importable; its errors are raised here."""
    threads = torch.get_num_threads()
    alone = distributed.is_distributed() or machine.device().type != "cpu"
    if alone or threads < WORKERS or len(items) < WORKERS:
        return [work(item) for item in items]
    # spawn: a forked copy of a process that has used OpenMP hangs
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _init_worker, (threads // WORKERS,)) as pool:
        packed = pool.map(partial(_call_pickled, work), map(pickle.dumps, items))
        return [pickle.loads(result) for result in packed]  # noqa: S301  (our own child's)


def _call_pickled(work: Callable[[A], T], item: bytes) -> bytes:
    """As bytes, there and back: PyTorch would otherwise share each tensor as an open file, and there are thousands."""
    return pickle.dumps(work(pickle.loads(item)))  # noqa: S301  (our own parent's)


def _init_worker(threads: int) -> None:
    Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends the others
    machine.prepare_torch()
    torch.set_num_threads(threads)
    console.plain()


def _exit_with_parent() -> None:
    """A first process that is killed cannot end the others, which would work on for hours, for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

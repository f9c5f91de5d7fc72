"""Saves checkpoints of a long run periodically, on SIGTERM and Ctrl-C, and at the end; resumes from them."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from advmoe.core import console
from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError, error_summary
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints import storage
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import machine
from advmoe.runtime.signals import RESUME_HINT, DeferredSignals, Interrupted, defer_signals

MAX_TIME_SHARE = 0.05  # maximum share of the time for saving: a large network on a slow disk is saved less often

StepCallback = Callable[[], None]


class Resumable(Protocol):
    """Work whose state can be saved and restored."""

    @property
    def position(self) -> tuple[int, ...]:
        """Position in the work, such as (epoch, step)."""
        ...

    @property
    def progress(self) -> str:
        """The position in words, for messages."""
        ...

    def checkpoint(self) -> Checkpoint:
        """Returns everything that changes between steps. Raises UserError for an invalid state, such as NaN weights."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores the state exactly. Raises UserError, and changes nothing, for a checkpoint of other work. Malformed
        content may raise other exceptions and leave the state partly restored.
        """
        ...


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Returns dtype and shape by name, which a checkpoint must share with the state it is loaded into."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def is_generator_state(state: Tensor) -> bool:
    """Returns whether `state` is a valid state of a torch.Generator."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def checkpointing(run: Resumable, name: str, file: Path | None) -> Iterator[StepCallback]:
    """Resumes `run` from `file` and saves checkpoints of it there; None for no checkpoints.

    Yields a callback to be called whenever the state is consistent: after each step and after each epoch.
    """
    if file is None:
        yield lambda: None
        return
    manager = CheckpointManager(run, name, file)
    manager.resume()
    with defer_signals() as signals:
        yield lambda: manager.on_step_end(signals)
        manager.save()  # an experiment with several networks resumes after this one


class CheckpointManager:
    """Saves and resumes checkpoints of a run. A disk error causes one warning and ends saving, but not the run."""

    def __init__(self, run: Resumable, name: str, file: Path) -> None:
        self.run, self.name, self.file = run, name, file
        self.saved: tuple[int, ...] | None = None
        self.next_save = time.monotonic() + machine().state_seconds
        self.enabled = distributed.is_rank0()  # all processes have the same state

    def resume(self) -> None:
        """Restores the state from the file, if there is one. Damaged files and files of other work are ignored with a
        warning. Raises UserError when restoring fails halfway.
        """
        checkpoint = distributed.run_on_rank0(self._load)
        if checkpoint is None:
            return
        try:
            self.run.load(checkpoint)
        except UserError as error:
            self._warn_ignored(f"{self.file} {error}")
            return
        except MALFORMED_INPUT_ERRORS as error:  # the state may be partly restored
            raise UserError(
                f"{self.file}: cannot be restored ({error_summary(error)}); remove it and run the same command again"
            ) from error
        self.saved = self.run.position
        console.info(f"{self.name}: resumed from a checkpoint, after {self.run.progress}")

    def _load(self) -> Checkpoint | None:
        try:
            return storage.load_checkpoint(self.file)
        except UserError as error:
            self._warn_ignored(str(error))
            return None

    def _warn_ignored(self, reason: str) -> None:
        console.warn(f"{reason} and ignored; {self.name} starts from the beginning")

    def on_step_end(self, signals: DeferredSignals) -> None:
        """Saves if it is time to. After a signal in any process, saves and raises Interrupted in all of them."""
        due = self.enabled and time.monotonic() >= self.next_save
        number = distributed.all_reduce_max(signals.pending or int(due))  # 1 only means that it is time to save
        if not number:
            return
        self.save()
        if number > 1:
            if self.enabled:
                console.info(f"{self.name}: checkpoint saved; {RESUME_HINT}")
            raise Interrupted(number)

    def save(self) -> None:
        """Saves, unless this position is saved. Raises UserError, and keeps the old file, for an invalid state."""
        if self.saved == self.run.position or not (self.enabled or distributed.is_distributed()):
            return
        started = time.monotonic()
        checkpoint = self.run.checkpoint()  # in every process, so that an invalid state raises in all of them
        if self.enabled:
            self.enabled = storage.save_checkpoint(self.file, checkpoint)
        self.saved, now = self.run.position, time.monotonic()
        self.next_save = now + max(machine().state_seconds, (now - started) / MAX_TIME_SHARE)

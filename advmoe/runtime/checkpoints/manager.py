"""What keeps a long run: its state on disk every now and then, when it is told to end, and when it is done."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from advmoe.core import console
from advmoe.core.errors import STUMBLES, UserError, first_line
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints import storage
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import machine
from advmoe.runtime.signals import RESUME_HINT, DeferredSignals, Interrupted, defer_signals

MAX_TIME_SHARE = 0.05  # of the time, at most, that saving may take: a large network on a slow disk is saved less often

StepCallback = Callable[[], None]


class Resumable(Protocol):
    """Work whose state can be taken and put back."""

    @property
    def position(self) -> tuple[int, ...]:
        """How far it is."""
        ...

    @property
    def progress(self) -> str:
        """The same in words."""
        ...

    def state(self) -> Checkpoint:
        """All that changes from step to step. Raises UserError for a state that is not worth keeping."""
        ...

    def restore(self, snapshot: Checkpoint) -> None:
        """Be as at that moment, to the last bit. Raises UserError, and changes nothing, for what is none of its own; or
        whatever it stumbles over, halfway.
        """
        ...


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Types and shapes by name: what a file must have in common with what it is to be put into."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def is_generator_state(state: Tensor) -> bool:
    """Whether a generator of random numbers can be in this state."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def checkpointing(run: Resumable, name: str, file: Path | None) -> Iterator[StepCallback]:
    """Put a run where a killed one left it, and keep it in `file` (None: nowhere).

    What is yielded must be called whenever the state is whole: after each step, and after each epoch.
    """
    if file is None:
        yield lambda: None
        return
    keeper = CheckpointManager(run, name, file)
    keeper.resume()
    with defer_signals() as held:
        yield lambda: keeper.look(held)
        keeper.save()  # a study that goes on with other networks need not train this one again


class CheckpointManager:
    """Saves a run to a file; a disk that does not take it costs one warning, never the run."""

    def __init__(self, run: Resumable, name: str, file: Path) -> None:
        self.run, self.name, self.file = run, name, file
        self.saved: tuple[int, ...] | None = None
        self.due = time.monotonic() + machine().state_seconds
        self.works = distributed.is_rank0()  # all processes are in the same state

    def resume(self) -> None:
        """Take over what there is; a damaged file is as good as none, and so is one of anything else."""
        found = distributed.run_on_rank0(self._found)
        if found is None:
            return
        try:
            self.run.restore(found)
        except UserError as error:
            self._anew(f"{self.file} {error}")
            return
        except STUMBLES as error:  # halfway: nobody knows what is of which run
            raise UserError(
                f"{self.file}: cannot be gone on with ({first_line(error)}); remove it and run the same command again"
            ) from error
        self.saved = self.run.position
        console.say(f"{self.name}: taken over from the run that was stopped, after {self.run.progress}")

    def _found(self) -> Checkpoint | None:
        try:
            return storage.load_checkpoint(self.file)
        except UserError as error:
            self._anew(str(error))
            return None

    def _anew(self, why: str) -> None:
        console.warn(f"{why} and left aside; {self.name} begins anew")

    def look(self, held: DeferredSignals) -> None:
        """Save if it is time to; if a process was told to end, save and let all of them."""
        due = self.works and time.monotonic() >= self.due
        told = distributed.all_reduce_max(held.pending or int(due))  # 1 is no signal of ours: it is only time to save
        if not told:
            return
        self.save()
        if told > 1:
            if self.works:
                console.say(f"{self.name}: kept as it is; {RESUME_HINT}")
            raise Interrupted(told)

    def save(self) -> None:
        """Save, unless just this was saved. Raises UserError for a run that has gone wrong, and keeps what it had."""
        if self.saved == self.run.position or not (self.works or distributed.is_distributed()):
            return
        started = time.monotonic()
        snapshot = self.run.state()  # by every process: what has gone wrong has so for all of them
        if self.works:
            self.works = storage.save_checkpoint(self.file, snapshot)
        self.saved, now = self.run.position, time.monotonic()
        self.due = now + max(machine().state_seconds, (now - started) / MAX_TIME_SHARE)

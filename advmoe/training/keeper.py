"""What keeps a long run: its state on disk every now and then, when it is told to end, and when it is done."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from advmoe import console, distributed, state
from advmoe.artifacts import hash_tensors
from advmoe.data.dataset import Dataset
from advmoe.errors import STUMBLES, UserError, first_line
from advmoe.interruption import GO_ON, Held, Interrupted, held_back
from advmoe.machine import machine
from advmoe.models.layers import plain, structure
from advmoe.state import KEY_LENGTH, Snapshot, circumstances, digest_of
from advmoe.training.cost import Learns

SHARE = 0.05  # of the time, at most, that saving may take: a large network on a slow disk is saved less often

Look = Callable[[], None]


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

    def state(self) -> Snapshot:
        """All that changes from step to step. Raises UserError for a state that is not worth keeping."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Be as at that moment, to the last bit. Raises UserError, and changes nothing, for what is none of its own; or
        whatever it stumbles over, halfway.
        """
        ...


def forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Types and shapes by name: what a file must have in common with what it is to be put into."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def is_stream(state: Tensor) -> bool:
    """Whether a generator of random numbers can be in this state."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


def identity(name: str, learner: Learns, dataset: Dataset, settings: object) -> str:
    """A file name that holds a hash of all that determines a training run: `settings`, the learner and its network as
    they are now, the images learned from and watched, and what of the machine shows in the last bits.
    """
    images = {
        f"{split}.{part}": tensor
        for split, rows in dataset.splits.items()
        if split in {"train", "validation"}
        for part, tensor in (("images", rows.images), ("labels", rows.labels))
    }
    key = digest_of(
        name,
        settings,
        [type(learner).__qualname__, plain(vars(learner))],
        fingerprint(learner.model),
        hash_tensors(images),
        circumstances(),
    )
    return f"{name.replace('/', '-')}-{key[:KEY_LENGTH]}.safetensors"


def fingerprint(model: nn.Module) -> str:
    """sha256 over all that determines what a network answers."""
    return digest_of(structure(model), hash_tensors(model.state_dict()))


@contextmanager
def kept(run: Resumable, name: str, file: Path | None) -> Iterator[Look]:
    """Put a run where a killed one left it, and keep it in `file` (None: nowhere).

    What is yielded must be called whenever the state is whole: after each step, and after each epoch.
    """
    if file is None:
        yield lambda: None
        return
    keeper = Keeper(run, name, file)
    keeper.resume()
    with held_back() as held:
        yield lambda: keeper.look(held)
        keeper.save()  # a study that goes on with other networks need not train this one again


class Keeper:
    """Saves a run to a file; a disk that does not take it costs one warning, never the run."""

    def __init__(self, run: Resumable, name: str, file: Path) -> None:
        self.run, self.name, self.file = run, name, file
        self.saved: tuple[int, ...] | None = None
        self.due = time.monotonic() + machine().state_seconds
        self.works = distributed.is_main()  # all processes are in the same state

    def resume(self) -> None:
        """Take over what there is; a damaged file is as good as none, and so is one of anything else."""
        found = distributed.on_main(self._found)
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

    def _found(self) -> Snapshot | None:
        try:
            return state.read(self.file)
        except UserError as error:
            self._anew(str(error))
            return None

    def _anew(self, why: str) -> None:
        console.warn(f"{why} and left aside; {self.name} begins anew")

    def look(self, held: Held) -> None:
        """Save if it is time to; if a process was told to end, save and let all of them."""
        due = self.works and time.monotonic() >= self.due
        told = distributed.largest(held.pending or int(due))  # 1 is no signal of ours: it is only time to save
        if not told:
            return
        self.save()
        if told > 1:
            if self.works:
                console.say(f"{self.name}: kept as it is; {GO_ON}")
            raise Interrupted(told)

    def save(self) -> None:
        """Save, unless just this was saved. Raises UserError for a run that has gone wrong, and keeps what it had."""
        if self.saved == self.run.position or not (self.works or distributed.is_distributed()):
            return
        started = time.monotonic()
        snapshot = self.run.state()  # by every process: what has gone wrong has so for all of them
        if self.works:
            self.works = state.keep(self.file, snapshot)
        self.saved, now = self.run.position, time.monotonic()
        self.due = now + max(machine().state_seconds, (now - started) / SHARE)

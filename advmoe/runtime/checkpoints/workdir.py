"""Unfinished work: where it is kept, so that what was killed goes on where it was.

One folder for each piece of work lies under `machine().state_dir`, not in the checkout: experiments that run in a copy
of it would not find it there. Its name ends with the version of the code and a hash of what the work is made of, so
that changed parameters, data or code begin anew. The folder is locked while somebody works, and removed when the result
is on record.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

import advmoe
from advmoe.core.errors import UserError
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints.storage import NOT_SAVED, warn_once
from advmoe.runtime.machine import device, machine

VERSION_LENGTH, KEY_LENGTH = 8, 16  # hex digits in a folder's name
NAME = re.compile(rf".+-([0-9a-f]{{{VERSION_LENGTH}}})-[0-9a-f]{{{KEY_LENGTH}}}")

LOCK = ".lock"

T = TypeVar("T")

_held: dict[Path, FileLock] = {}  # of this process, which may come back to a folder that it holds already


@lru_cache(maxsize=1)
def code_digest() -> str:
    """sha256 over this package's own source: another version does not take over what this one left."""
    root = Path(advmoe.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def hash_of(*facts: object) -> str:
    """sha256 over what is printed of some facts: numbers, texts, settings and collections of these."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()


def environment_fingerprint() -> list[object]:
    """What shows in the last bits of a result, beside its settings and its data: the machine, and the code.

    One process alone promises the last bit. Several leave it to others to go on, more or fewer: then even what a
    BatchNorm normalises together differs.
    """
    place = device()
    if distributed.is_distributed():
        return ["several processes", place.type, torch.__version__, code_digest(), machine().compile]
    return [
        [place.type, torch.cuda.get_device_name(place) if place.type == "cuda" else torch.get_num_threads()],
        [torch.__version__, torch.backends.cpu.get_cpu_capability(), code_digest(), machine().compile],
    ]


def checkpoint_path(shelf: Path | None, label: str, *facts: object) -> Path | None:
    """The file on a shelf for what `facts` determine here and now; None without a shelf."""
    key = hash_of(label, facts, environment_fingerprint())[:KEY_LENGTH]
    return shelf and shelf / f"{label.replace('/', '-')}-{key}.safetensors"


@dataclass(frozen=True)
class WorkDir:
    """The folder of one piece of work."""

    folder: Path

    @classmethod
    def of(cls, label: str, *facts: object) -> "WorkDir":
        """Where work called `label` and determined by `facts` is kept."""
        name = f"{label.replace('/', '-')}-{code_digest()[:VERSION_LENGTH]}-{hash_of(*facts)[:KEY_LENGTH]}"
        return cls(machine().state_dir / name)

    @property
    def is_of_this_version(self) -> bool:
        """Whether this code could go on with it."""
        name = NAME.fullmatch(self.folder.name)
        return name is not None and name[1] == code_digest()[:VERSION_LENGTH]

    def take(self) -> bool:
        """Lock the folder until `leave`, or until this process ends. False when another process has it.

        Raises OSError when it cannot be written.
        """
        if self.folder in _held:
            return True
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_name(self.folder.name + LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        _held[self.folder] = lock
        return True

    def leave(self) -> None:
        """Unlock the folder."""
        lock = _held.pop(self.folder)
        Path(lock.lock_file).unlink(missing_ok=True)  # before it is free, or another's lock would be removed
        lock.release()

    def remove(self) -> None:
        """Forget the work, which must be locked by this process; unlocks it."""
        assert self.folder in _held
        shutil.rmtree(self.folder, ignore_errors=True)
        self.leave()

    def size(self) -> int:
        """Bytes of the files in it."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@contextmanager
def open_workdir(label: str, *facts: object) -> Iterator[Path | None]:
    """The folder to keep unfinished work in, locked; removed when the block ends without an exception.

    Of several processes of one run the first has the lock. None, with a warning, when another run is at the same work
    or the folder cannot be written: work goes on and nothing is kept. To wait for the other would gain nothing, as it
    may be stopped or gone on for hours.
    """
    place = WorkDir.of(label, *facts)
    if not distributed.run_on_rank0(lambda: try_lock(place)):
        yield None
        return
    try:
        yield place.folder
    except BaseException:
        if distributed.is_rank0():
            place.leave()
        raise
    if distributed.is_rank0():
        place.remove()


def try_lock(place: WorkDir) -> bool:
    """Lock a place if that is possible; says why it is not."""
    try:
        free = place.take()
    except OSError as error:
        warn_once(f"{machine().state_dir}: {error.strerror or error}; {NOT_SAVED}")
        return False
    if not free:
        warn_once(f"{place.folder}: another process is at the same work; {NOT_SAVED}")
    return free


# ---- what is left over


@dataclass(frozen=True)
class CleanResult:
    """Numbers of folders: removed (and their bytes), left because they can go on, left because they are in use."""

    removed: int
    freed: int
    resumable: int
    in_use: int


def clean(*, everything: bool) -> CleanResult:
    """Remove what other versions left behind, or `everything`; never what a process is at work on.

    Raises UserError when the folder cannot be written.
    """
    removed = freed = resumable = in_use = 0
    for place in _workdirs():
        if place.is_of_this_version and place.folder.exists() and not everything:
            resumable += 1
        elif not _is_free(place):
            in_use += 1
        else:
            freed, removed = freed + place.size(), removed + place.folder.exists()
            place.remove()
    return CleanResult(removed, freed, resumable, in_use)


def _is_free(place: WorkDir) -> bool:
    try:
        return place.take()
    except OSError as error:
        raise UserError(f"{machine().state_dir}: {error.strerror or error}") from error


def _workdirs() -> list[WorkDir]:
    """All there are, those included of which a kill left only the lock. What is called otherwise is not ours."""
    root = machine().state_dir
    found = {path.name.removesuffix(LOCK) for path in (root.iterdir() if root.is_dir() else ())}
    return [WorkDir(root / name) for name in sorted(found) if NAME.fullmatch(name)]

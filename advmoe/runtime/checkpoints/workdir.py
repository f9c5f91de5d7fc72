"""Folders for checkpoints of unfinished work: names, locks and cleaning.

Each piece of work has a folder under `machine().state_dir`, outside the checkout: DVC experiments may run in a copy of
it. The name ends with the fingerprint of the code of its stage and a hash of everything that determines the work, so
that changed parameters, data or code start from the beginning, and an edit of other code does not. The folder is locked
during work, and removed when the result is written.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from advmoe.core import console, files
from advmoe.core.errors import UserError
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints.storage import NOT_SAVED, warn_once
from advmoe.runtime.code_fingerprint import code_fingerprint, package_fingerprint, stage_fingerprint, stage_names
from advmoe.runtime.machine import device, machine

VERSION_LENGTH, KEY_LENGTH = 8, 16  # hex digits in a folder's name
FOLDER_NAME = re.compile(rf"(.+)-([0-9a-f]{{{VERSION_LENGTH}}})-([0-9a-f]{{{KEY_LENGTH}}})")

LOCK_SUFFIX = ".lock"
ENVIRONMENT = "environment"  # file of a folder: a hash of the environment that its checkpoints were made in

_locks: dict[Path, FileLock] = {}  # held by this process, which may open a folder twice


def hash_values(*values: object) -> str:
    """Returns the sha256 over the repr of values: numbers, strings, settings and collections of these."""
    return hashlib.sha256("\n".join(map(repr, values)).encode()).hexdigest()


def environment_fingerprint() -> list[object]:
    """Returns what determines the rounding of a result: hardware, PyTorch and code.

    Only a single process resumes bit for bit. Under torchrun another number of processes may resume, and the batches
    over which a BatchNorm normalises differ.
    """
    current = device()
    if distributed.is_distributed():
        return ["several processes", current.type, torch.__version__, code_fingerprint(), machine().compile]
    return [
        [current.type, torch.cuda.get_device_name(current) if current.type == "cuda" else torch.get_num_threads()],
        [torch.__version__, torch.backends.cpu.get_cpu_capability(), code_fingerprint(), machine().compile],
    ]


def checkpoint_path(checkpoint_dir: Path | None, label: str, *facts: object) -> Path | None:
    """Returns the checkpoint file of the work that `label`, `facts` and the environment determine; None without a
    folder.
    """
    key = hash_values(label, facts, environment_fingerprint())[:KEY_LENGTH]
    return checkpoint_dir and checkpoint_dir / f"{label.replace('/', '-')}-{key}.safetensors"


@dataclass(frozen=True)
class WorkDir:
    """The folder of one piece of work."""

    folder: Path

    @classmethod
    def of(cls, label: str, *facts: object) -> "WorkDir":
        """Returns the folder of the work that `label` and `facts` determine."""
        name = f"{label.replace('/', '-')}-{code_fingerprint()[:VERSION_LENGTH]}-{hash_values(*facts)[:KEY_LENGTH]}"
        return cls(machine().state_dir / name)

    @property
    def label(self) -> str:
        """The label that the folder was made for; empty for another folder."""
        name = FOLDER_NAME.fullmatch(self.folder.name)
        return name[1] if name is not None else ""

    @property
    def version(self) -> str:
        """The first digits of the code's fingerprint; empty for another folder."""
        name = FOLDER_NAME.fullmatch(self.folder.name)
        return name[2] if name is not None else ""

    @property
    def is_of_this_version(self) -> bool:
        """Whether this version of the code can resume it: that of its stage, or of the package outside of stages."""
        stage = self.label.partition("-")[0]
        current = {code_fingerprint(), package_fingerprint()}
        current |= {stage_fingerprint(stage)} if stage in stage_names() else set()
        return self.version in {fingerprint[:VERSION_LENGTH] for fingerprint in current}

    def reason_to_start_over(self) -> str | None:
        """Returns why earlier work of this label cannot be resumed here; None if there is none, or it can be."""
        if self.folder.is_dir():
            made_in = self.folder / ENVIRONMENT
            other = made_in.is_file() and made_in.read_text() != _environment()
            return "it was made on another device or with other threads or another PyTorch" if other else None
        others = [other for other in _workdirs() if other.label == self.label and other.folder.is_dir()]
        if not others:
            return None
        if any(other.version == self.version for other in others):
            return "its parameters or data changed"
        return "the code of its stage changed"

    def lock(self) -> bool:
        """Locks the folder until `unlock`, or until this process ends. Returns False if another process has the lock.

        Raises OSError when the lock file cannot be written.
        """
        if self.folder in _locks:
            return True
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        file_lock = FileLock(self.folder.with_name(self.folder.name + LOCK_SUFFIX))
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            return False
        _locks[self.folder] = file_lock
        return True

    def unlock(self) -> None:
        """Unlocks the folder, which this process must have locked."""
        file_lock = _locks.pop(self.folder)
        Path(file_lock.lock_file).unlink(missing_ok=True)  # before the release: afterwards it may be another process's
        file_lock.release()

    def remove(self) -> None:
        """Removes the folder, which this process must have locked, and unlocks it."""
        assert self.folder in _locks
        shutil.rmtree(self.folder, ignore_errors=True)
        self.unlock()

    def size(self) -> int:
        """Returns the size of all files in the folder, in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@contextmanager
def open_workdir(label: str, *facts: object) -> Iterator[Path | None]:
    """Context manager that yields the locked folder for checkpoints; removes it when the block ends without exception.

    Under torchrun rank 0 holds the lock. Yields None, with a warning, when another run does the same work or the folder
    is not writable: work then continues without checkpoints. It does not wait for the other run, which may take hours.
    """
    workdir = WorkDir.of(label, *facts)
    if not distributed.run_on_rank0(lambda: try_lock(workdir)):
        yield None
        return
    if distributed.is_rank0():
        _warn_about_earlier_work(workdir)
    try:
        yield workdir.folder
    except BaseException:
        if distributed.is_rank0():
            workdir.unlock()
        raise
    if distributed.is_rank0():
        workdir.remove()


def _warn_about_earlier_work(workdir: WorkDir) -> None:
    """Warns if earlier work is not resumed, with the reason, and records the environment of the work in this folder."""
    reason = workdir.reason_to_start_over()
    if reason is not None:
        console.warn(f"{workdir.label}: earlier unfinished work is not resumed: {reason}")
    with suppress(UserError):  # a disk that is full or read-only is reported when a checkpoint is saved
        files.write_text(workdir.folder / ENVIRONMENT, _environment())


def _environment() -> str:
    return hash_values(environment_fingerprint())


def try_lock(workdir: WorkDir) -> bool:
    """Locks a folder. Returns False, with a warning, when another process has the lock or it is not writable."""
    try:
        locked = workdir.lock()
    except OSError as error:
        warn_once(f"{machine().state_dir}: {error.strerror or error}; {NOT_SAVED}")
        return False
    if not locked:
        warn_once(f"{workdir.folder}: another process does the same work; {NOT_SAVED}")
    return locked


# ---- cleaning


@dataclass(frozen=True)
class CleanResult:
    """Numbers of folders that were removed, kept as resumable, and kept as in use; bytes that were freed."""

    removed: int
    freed_bytes: int
    resumable: int
    in_use: int


def clean(*, everything: bool) -> CleanResult:
    """Removes the folders of other versions of the code, or with `everything` all folders; never one in use.

    Raises UserError when the folder of checkpoints is not writable.
    """
    removed = freed_bytes = resumable = in_use = 0
    for workdir in _workdirs():
        if workdir.is_of_this_version and workdir.folder.exists() and not everything:
            resumable += 1
        elif not _lock_to_remove(workdir):
            in_use += 1
        else:
            freed_bytes, removed = freed_bytes + workdir.size(), removed + workdir.folder.exists()
            workdir.remove()
    return CleanResult(removed, freed_bytes, resumable, in_use)


def _lock_to_remove(workdir: WorkDir) -> bool:
    try:
        return workdir.lock()
    except OSError as error:
        raise UserError(f"{machine().state_dir}: {error.strerror or error}") from error


def _workdirs() -> list[WorkDir]:
    """Returns all folders, including those of which only a lock file is left; ignores files with other names."""
    root = machine().state_dir
    names = {path.name.removesuffix(LOCK_SUFFIX) for path in (root.iterdir() if root.is_dir() else ())}
    return [WorkDir(root / name) for name in sorted(names) if FOLDER_NAME.fullmatch(name)]

"""Unfinished work: where it is kept, so that what was killed goes on where it was.

One folder for each piece of work lies under `machine().state_dir`, not in the checkout: experiments that run in a copy
of it would not find it there. Its name ends with the version of the code and a hash of what the work is made of, so
that changed parameters, data or code begin anew. The folder is locked while somebody works, and removed when the result
is on record.
"""

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

import advmoe
from advmoe import console, distributed
from advmoe.artifacts import hash_tensors
from advmoe.errors import STUMBLES, UserError
from advmoe.files import as_written, write_bytes
from advmoe.machine import device, machine

VERSION_LENGTH, KEY_LENGTH = 8, 16  # hex digits in a folder's name
NAME = re.compile(rf".+-([0-9a-f]{{{VERSION_LENGTH}}})-[0-9a-f]{{{KEY_LENGTH}}}")
CHECKSUM, VALUES = "sha256", "values"
LOCK = ".lock"
UNKEPT = "work goes on, but nothing is kept for the case of a kill"

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


def digest_of(*facts: object) -> str:
    """sha256 over what is printed of some facts: numbers, texts, settings and collections of these."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()


def circumstances() -> list[object]:
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


def spot(shelf: Path | None, label: str, *facts: object) -> Path | None:
    """The file on a shelf for what `facts` determine here and now; None without a shelf."""
    key = digest_of(label, facts, circumstances())[:KEY_LENGTH]
    return shelf and shelf / f"{label.replace('/', '-')}-{key}.safetensors"


@dataclass(frozen=True)
class Place:
    """The folder of one piece of work."""

    folder: Path

    @classmethod
    def of(cls, label: str, *facts: object) -> "Place":
        """Where work called `label` and determined by `facts` is kept."""
        name = f"{label.replace('/', '-')}-{code_digest()[:VERSION_LENGTH]}-{digest_of(*facts)[:KEY_LENGTH]}"
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
def work(label: str, *facts: object) -> Iterator[Path | None]:
    """The folder to keep unfinished work in, locked; removed when the block ends without an exception.

    Of several processes of one run the first has the lock. None, with a warning, when another run is at the same work
    or the folder cannot be written: work goes on and nothing is kept. To wait for the other would gain nothing, as it
    may be stopped or gone on for hours.
    """
    place = Place.of(label, *facts)
    if not distributed.on_main(lambda: taken(place)):
        yield None
        return
    try:
        yield place.folder
    except BaseException:
        if distributed.is_main():
            place.leave()
        raise
    if distributed.is_main():
        place.remove()


def taken(place: Place) -> bool:
    """Lock a place if that is possible; says why it is not."""
    try:
        free = place.take()
    except OSError as error:
        warn_once(f"{machine().state_dir}: {error.strerror or error}; {UNKEPT}")
        return False
    if not free:
        warn_once(f"{place.folder}: another process is at the same work; {UNKEPT}")
    return free


@lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """A full disk need not be reported for every network."""
    console.warn(text)


# ---- one file of state


@dataclass(frozen=True)
class Snapshot:
    """Work at one moment: tensors by name, and values that JSON knows."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def keep(path: Path, snapshot: Snapshot) -> bool:
    """Write a snapshot, atomically and with a checksum over all of it; False, with a warning, if the disk does not take
    it: work must not fail because it cannot be kept.
    """
    try:
        _write(path, snapshot)
    except UserError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        warn_once(f"{machine().state_dir}: {reason}; {UNKEPT}")
        return False
    return True


def _write(path: Path, snapshot: Snapshot) -> None:
    values = bytearray(json.dumps(snapshot.values).encode())
    named = {**snapshot.tensors, VALUES: torch.frombuffer(values, dtype=torch.uint8)}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    write_bytes(path, to_safetensors(stored, metadata={CHECKSUM: hash_tensors(stored)}))


def read(path: Path) -> Snapshot | None:
    """The snapshot in a file, on the CPU; None when there is none. Raises UserError when it is damaged.

    Whose tensors and values they are is for the caller to see: who can write the file can write a checksum as well.
    """
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except FileNotFoundError:
        return None
    except (SafetensorError, *STUMBLES) as error:
        raise UserError(f"{path} is damaged") from error
    if hash_tensors(tensors) != checksum:
        raise UserError(f"{path} is damaged")
    return Snapshot(tensors, _values(path, tensors.pop(VALUES, None)))


def _values(path: Path, stored: Tensor | None) -> dict[str, Any]:
    try:
        values = json.loads(bytes(stored.tolist())) if stored is not None else None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged")
    return values


def remembered(file: Path | None, find: Callable[[], Snapshot], as_kept: Callable[[Snapshot], T]) -> T:
    """What is kept in a file (None: nowhere), else what `find` finds, which is kept there; `as_kept` reads either.

    A file that is damaged, or holds something else, is as good as none.
    """
    try:
        known = read(file) if file is not None else None
        if known is not None:
            with as_written(file):
                return as_kept(known)
    except UserError as error:
        console.warn(f"{error}; it is left aside, and what it held is found again")
    found = find()
    if file is not None:
        keep(file, found)
    return as_kept(found)


def flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several parts under one name each, `part/name`."""
    return {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}


def in_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `flat` put together; a part that held nothing is empty."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def memory_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of its parameters, as `number/name`."""
    found = optimizer.state_dict()["state"]
    return flat(
        {str(number): {name: each for name, each in kept.items() if each is not None} for number, kept in found.items()}
    )


def remind(optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor]) -> None:
    """Make a fresh optimiser remember what `memory_of` another told."""
    kept = {int(number): found for number, found in in_parts(memory).items()}
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})


# ---- what is left over


@dataclass(frozen=True)
class Cleaned:
    """Numbers of folders: removed (and their bytes), left because they can go on, left because they are in use."""

    removed: int
    freed: int
    resumable: int
    in_use: int


def clean(*, everything: bool) -> Cleaned:
    """Remove what other versions left behind, or `everything`; never what a process is at work on.

    Raises UserError when the folder cannot be written.
    """
    removed = freed = resumable = in_use = 0
    for place in _places():
        if place.is_of_this_version and place.folder.exists() and not everything:
            resumable += 1
        elif not _is_free(place):
            in_use += 1
        else:
            freed, removed = freed + place.size(), removed + place.folder.exists()
            place.remove()
    return Cleaned(removed, freed, resumable, in_use)


def _is_free(place: Place) -> bool:
    try:
        return place.take()
    except OSError as error:
        raise UserError(f"{machine().state_dir}: {error.strerror or error}") from error


def _places() -> list[Place]:
    """All there are, those included of which a kill left only the lock. What is called otherwise is not ours."""
    root = machine().state_dir
    found = {path.name.removesuffix(LOCK) for path in (root.iterdir() if root.is_dir() else ())}
    return [Place(root / name) for name in sorted(found) if NAME.fullmatch(name)]

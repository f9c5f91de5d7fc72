"""One checkpoint file: tensors and JSON values in one safetensors file, written atomically, with a checksum."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from advmoe.core import console
from advmoe.core.artifacts import hash_tensors
from advmoe.core.errors import STUMBLES, UserError
from advmoe.core.files import as_written, write_bytes
from advmoe.runtime.machine import machine

CHECKSUM, VALUES = "sha256", "values"

T = TypeVar("T")


NOT_SAVED = "work goes on, but nothing is kept for the case of a kill"


@lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """A full disk need not be reported for every network."""
    console.warn(text)


@dataclass(frozen=True)
class Checkpoint:
    """Work at one moment: tensors by name, and values that JSON knows."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save_checkpoint(path: Path, snapshot: Checkpoint) -> bool:
    """Write a snapshot, atomically and with a checksum over all of it; False, with a warning, if the disk does not take
    it: work must not fail because it cannot be kept.
    """
    try:
        _write(path, snapshot)
    except UserError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        warn_once(f"{machine().state_dir}: {reason}; {NOT_SAVED}")
        return False
    return True


def _write(path: Path, snapshot: Checkpoint) -> None:
    values = bytearray(json.dumps(snapshot.values).encode())
    named = {**snapshot.tensors, VALUES: torch.frombuffer(values, dtype=torch.uint8)}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    write_bytes(path, to_safetensors(stored, metadata={CHECKSUM: hash_tensors(stored)}))


def load_checkpoint(path: Path) -> Checkpoint | None:
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
    return Checkpoint(tensors, _values(path, tensors.pop(VALUES, None)))


def _values(path: Path, stored: Tensor | None) -> dict[str, Any]:
    try:
        values = json.loads(bytes(stored.tolist())) if stored is not None else None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged")
    return values


def load_or_compute(file: Path | None, find: Callable[[], Checkpoint], as_kept: Callable[[Checkpoint], T]) -> T:
    """What is kept in a file (None: nowhere), else what `find` finds, which is kept there; `as_kept` reads either.

    A file that is damaged, or holds something else, is as good as none.
    """
    try:
        known = load_checkpoint(file) if file is not None else None
        if known is not None:
            with as_written(file):
                return as_kept(known)
    except UserError as error:
        console.warn(f"{error}; it is left aside, and what it held is found again")
    found = find()
    if file is not None:
        save_checkpoint(file, found)
    return as_kept(found)


def flatten(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several parts under one name each, `part/name`."""
    return {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `flat` put together; a part that held nothing is empty."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of its parameters, as `number/name`."""
    found = optimizer.state_dict()["state"]
    return flatten(
        {str(number): {name: each for name, each in kept.items() if each is not None} for number, kept in found.items()}
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor]) -> None:
    """Make a fresh optimiser remember what `memory_of` another told."""
    kept = {int(number): found for number, found in unflatten(memory).items()}
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})

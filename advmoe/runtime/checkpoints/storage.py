"""The format of checkpoint files: tensors and JSON values in a safetensors file with a checksum."""

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
from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError
from advmoe.core.files import report_malformed, write_bytes
from advmoe.runtime.machine import machine

CHECKSUM_KEY, VALUES_KEY = "sha256", "values"

T = TypeVar("T")

NOT_SAVED = "work continues without checkpoints"


@lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """Prints a warning, once per text: a full disk affects every network."""
    console.warn(text)


@dataclass(frozen=True)
class Checkpoint:
    """State of unfinished work: tensors by name, and JSON-serialisable values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> bool:
    """Writes a checkpoint atomically, with a checksum. Returns False, with a warning, when the file cannot be written:
    a run must not fail because of its checkpoints.
    """
    try:
        _write(path, checkpoint)
    except UserError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        warn_once(f"{machine().state_dir}: {reason}; {NOT_SAVED}")
        return False
    return True


def _write(path: Path, checkpoint: Checkpoint) -> None:
    values = bytearray(json.dumps(checkpoint.values).encode())
    tensors = {**checkpoint.tensors, VALUES_KEY: torch.frombuffer(values, dtype=torch.uint8)}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, to_safetensors(stored, metadata={CHECKSUM_KEY: hash_tensors(stored)}))


def load_checkpoint(path: Path) -> Checkpoint | None:
    """Reads a checkpoint to the CPU; None if the file is missing. Raises UserError when it is damaged.

    The caller must check that it fits: the checksum protects against damage, not against a forged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(CHECKSUM_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except FileNotFoundError:
        return None
    except (SafetensorError, *MALFORMED_INPUT_ERRORS) as error:
        raise UserError(f"{path} is damaged") from error
    if hash_tensors(tensors) != checksum:
        raise UserError(f"{path} is damaged")
    return Checkpoint(tensors, _values(path, tensors.pop(VALUES_KEY, None)))


def _values(path: Path, stored: Tensor | None) -> dict[str, Any]:
    try:
        values = json.loads(bytes(stored.tolist())) if stored is not None else None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged")
    return values


def load_or_compute(file: Path | None, compute: Callable[[], Checkpoint], decode: Callable[[Checkpoint], T]) -> T:
    """Returns `decode` of the checkpoint in `file`; if there is none, of `compute()`, which is saved there.

    Damaged files and files of other content are ignored with a warning. `file`: None to save nothing.
    """
    try:
        saved = load_checkpoint(file) if file is not None else None
        if saved is not None:
            with report_malformed(file):
                return decode(saved)
    except UserError as error:
        console.warn(f"{error}; it is ignored, and its content computed again")
    checkpoint = compute()
    if file is not None:
        save_checkpoint(file, checkpoint)
    return decode(checkpoint)


def flatten(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of several parts under the names `part/name`."""
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Inverts `flatten`; a missing part is empty."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the tensors of an optimizer's state under the names `number of the parameter/name`."""
    states = optimizer.state_dict()["state"]
    return flatten(
        {str(number): {name: each for name, each in of.items() if each is not None} for number, of in states.items()}
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Loads the result of `optimizer_state` into a new optimizer."""
    states = {int(number): state for number, state in unflatten(tensors).items()}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

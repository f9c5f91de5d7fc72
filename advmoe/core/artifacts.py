"""Safetensors in and out: what a file is, what it was made from, and whether it is intact.

An artifact is a safetensors file with one metadata key, `advmoe`, that holds canonical JSON. One key, because
safetensors writes several in random order; equal inputs must give equal bytes or DVC's cache is worthless. What
differs between two runs of the same work (commit, host, seconds) goes into a sidecar, `<name>.run.json`.
"""

import hashlib
import json
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from advmoe.core.errors import STUMBLES, UserError, first_line
from advmoe.core.files import canonical_json, write_bytes, write_json
from advmoe.core.resources import peak_memory
from advmoe.core.settings import validate

SCHEMA = 1
METADATA_KEY = "advmoe"


class Header(BaseModel):
    """What an artifact says of itself.

    `about` holds what a reader needs to use the tensors (an architecture, class names); `inputs` the sha256 of the
    artifacts it was made from; `params` the settings it was made with; `metrics` validation numbers, never test.
    `sha256` covers the tensors and is what other artifacts refer to; `header_sha256` covers everything else here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: str
    schema_version: int = Field(default=SCHEMA)
    about: dict[str, Any]
    params: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    torch: str
    metrics: dict[str, Any]
    sha256: str
    header_sha256: str = ""

    def own_hash(self) -> str:
        """sha256 over all of this but itself."""
        return hashlib.sha256(canonical_json(self.model_dump(exclude={"header_sha256"})).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its header, and its tensors by name."""

    header: Header
    tensors: dict[str, Tensor]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())  # as bytes: NumPy knows not all types
    return digest.hexdigest()


def save(
    path: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    about: Mapping[str, Any],
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    metrics: Mapping[str, Any],
    seconds: float,
    timings: Mapping[str, float] | None = None,
) -> Header:
    """Write an artifact atomically, and its sidecar; returns the header written.

    The bytes depend on the arguments and the PyTorch version only. `seconds` and `timings`, its parts by
    name, go to the sidecar.
    """
    # contiguous in the default layout: channels_last is a matter of the machine, not of the weights
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = Header(
        kind=kind,
        about=dict(about),
        params=dict(params),
        inputs=dict(inputs),
        seed=seed,
        torch=torch.__version__,
        metrics=dict(metrics),
        sha256=hash_tensors(stored),
    )
    header = header.model_copy(update={"header_sha256": header.own_hash()})
    write_bytes(path, to_safetensors(stored, metadata={METADATA_KEY: canonical_json(header.model_dump())}))
    write_json(
        sidecar(path),
        {"sha256": header.sha256, **circumstances(seconds), **({"timings": dict(timings)} if timings else {})},
    )
    return header


def load(path: Path, kind: str | None = None) -> Artifact:
    """Read an artifact and check kind, schema and content hash.

    Raises UserError when the file is missing, truncated, altered, of another kind or schema, or not an artifact.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `dvc repro` or `make repro` builds the pipeline's artifacts") from error
    except (SafetensorError, *STUMBLES) as error:  # KeyError, say, for a type that PyTorch has not
        raise UserError(f"{path}: not a safetensors file, or a truncated one ({first_line(error)})") from error
    header = _parse_header(path, metadata)
    if kind is not None and header.kind != kind:
        raise UserError(f"{path}: holds a {header.kind}, but a {kind} is needed here")
    if not _intact(header, tensors):
        raise UserError(f"{path}: content does not match its checksum; the file was altered or damaged")
    return Artifact(header, tensors)


def _intact(header: Header, tensors: Mapping[str, Tensor]) -> bool:
    try:
        return hash_tensors(tensors) == header.sha256 and header.own_hash() == header.header_sha256
    except ValueError:  # NaN, or half a character: no header of ours holds what canonical JSON cannot
        return False


def _parse_header(path: Path, metadata: Mapping[str, str]) -> Header:
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not written by advmoe (no '{METADATA_KEY}' header)")
    try:
        content = json.loads(metadata[METADATA_KEY])
        json.dumps(content, ensure_ascii=False).encode()  # half a character is valid JSON, and cannot be written down
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its '{METADATA_KEY}' header is not valid JSON ({error})") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise UserError(f"{path}: written in schema {version}, this advmoe reads schema {SCHEMA}; build it again")
    return validate(content, Header, f"{path}: header")


def sidecar(path: Path) -> Path:
    """Where the circumstances of an artifact's making lie: beside it, untracked."""
    return path.with_suffix(".run.json")


def circumstances(seconds: float) -> dict[str, Any]:
    """What may differ between two runs of the same work: commit, machine, time and memory."""
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "peak_memory": peak_memory(),
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command, None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

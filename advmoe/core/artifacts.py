"""Saving and loading of artifacts: safetensors files with a header, checksums and provenance.

An artifact is a safetensors file with one metadata key, `advmoe`, that holds canonical JSON. One key, because
safetensors writes several in random order, and DVC's cache needs equal bytes for equal inputs. What differs between two
runs of the same work (commit, host, seconds) goes into a sidecar file, `<name>.run.json`.
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

from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError, error_summary
from advmoe.core.files import canonical_json, write_bytes, write_json
from advmoe.core.resources import peak_memory
from advmoe.core.settings import validate

SCHEMA_VERSION = 1
METADATA_KEY = "advmoe"


class Header(BaseModel):
    """Metadata of an artifact.

    `about` holds what is needed to use the tensors (architecture, class names), `inputs` the sha256 of the artifacts it
    was made from, `params` the settings it was made with, `metrics` numbers on the validation split, never on test.
    `sha256` covers the tensors and is what other artifacts refer to; `header_sha256` covers the rest of the header.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: str
    schema_version: int = Field(default=SCHEMA_VERSION)
    about: dict[str, Any]
    params: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    torch: str
    metrics: dict[str, Any]
    sha256: str
    header_sha256: str = ""

    def compute_hash(self) -> str:
        """Returns the sha256 over all fields except `header_sha256`."""
        return hashlib.sha256(canonical_json(self.model_dump(exclude={"header_sha256"})).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: header, and tensors by name."""

    header: Header
    tensors: dict[str, Tensor]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 over names, types, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(
                tensor.flatten().view(torch.uint8).numpy().tobytes()
            )  # as bytes: NumPy lacks some of the types
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
    """Writes an artifact and its sidecar file atomically; returns the header.

    The bytes depend only on the arguments and the PyTorch version. `seconds` and `timings`, its parts by name, go to
    the sidecar. Raises UserError when the files cannot be written.
    """
    # in the default memory format: channels_last depends on the machine
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
    header = header.model_copy(update={"header_sha256": header.compute_hash()})
    write_bytes(path, to_safetensors(stored, metadata={METADATA_KEY: canonical_json(header.model_dump())}))
    write_json(
        sidecar_path(path),
        {"sha256": header.sha256, **run_provenance(seconds), **({"timings": dict(timings)} if timings else {})},
    )
    return header


def load(path: Path, kind: str | None = None) -> Artifact:
    """Reads an artifact and checks its kind, schema version and checksums.

    Raises UserError when the file is missing, truncated, altered, of another kind or schema version, or no artifact.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `dvc repro` or `make repro` builds the pipeline's artifacts") from error
    except (SafetensorError, *MALFORMED_INPUT_ERRORS) as error:  # such as KeyError for a type that PyTorch lacks
        raise UserError(f"{path}: not a safetensors file, or a truncated one ({error_summary(error)})") from error
    header = _parse_header(path, metadata)
    if kind is not None and header.kind != kind:
        raise UserError(f"{path}: holds a {header.kind}, but a {kind} is needed here")
    if not _checksums_match(header, tensors):
        raise UserError(f"{path}: content does not match its checksum; the file is altered or damaged")
    return Artifact(header, tensors)


def _checksums_match(header: Header, tensors: Mapping[str, Tensor]) -> bool:
    try:
        return hash_tensors(tensors) == header.sha256 and header.compute_hash() == header.header_sha256
    except ValueError:  # NaN or a lone surrogate: canonical JSON cannot represent them
        return False


def _parse_header(path: Path, metadata: Mapping[str, str]) -> Header:
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not written by advmoe (no '{METADATA_KEY}' header)")
    try:
        content = json.loads(metadata[METADATA_KEY])
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is valid JSON, but cannot be encoded
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its '{METADATA_KEY}' header is not valid JSON ({error})") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: has schema version {version}, this advmoe reads version {SCHEMA_VERSION}; build it again"
        )
    return validate(content, Header, f"{path}: header")


def sidecar_path(path: Path) -> Path:
    """Returns the path of an artifact's sidecar file, which is not tracked by DVC."""
    return path.with_suffix(".run.json")


def run_provenance(seconds: float) -> dict[str, Any]:
    """Returns what may differ between two runs of the same work: commit, machine, time, memory in bytes."""
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
    """Returns the output of a git command; None without git or outside a repository."""
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()

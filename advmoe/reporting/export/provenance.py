"""What an export says of itself: which network it is, what it was made from, and in which circumstances.

An artifact holds nothing that differs between two runs of the same work. Those who meet a network outside its project
cannot look into the project's history, so an export adds commit and package versions. The name of the host stays home.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from advmoe.core import artifacts
from advmoe.core.artifacts import Header
from advmoe.core.errors import UserError
from advmoe.core.files import read_json
from advmoe.core.settings import Settings, validate
from advmoe.models.classifiers import About, Classifier

PACKAGES = ("advmoe", "huggingface_hub", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors", "torch")


class Circumstances(Settings):
    """`commit` is None outside git; `dirty`: tracked files differed from the commit."""

    commit: str | None
    dirty: bool | None
    python: str


class Training(Circumstances):
    """When the artifact was made: on how many threads, in how many seconds."""

    threads: int
    seconds: float


class Export(Circumstances):
    """When the export was made: the versions of the `packages` that had a hand in it."""

    packages: dict[str, str]


class Provenance(Settings):
    """Where a network comes from.

    The first seven are those of the artifact's header (`advmoe.core.artifacts.Header`). `training` is None if
    the artifact came without its sidecar, as one fetched from a DVC remote does.
    """

    params: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    torch: str
    metrics: dict[str, Any]
    sha256: str
    header_sha256: str
    training: Training | None
    export: Export


class Description(About):
    """Architecture and facts, as in the artifact, and all that is known of their origin."""

    advmoe: str
    schema_version: int
    provenance: Provenance


def describe(artifact: Path, classifier: Classifier) -> Description:
    """The description of a `classifier` that was read from the file `artifact`.

    Raises UserError when the artifact's sidecar is there but cannot be read.
    """
    header = classifier.header
    origin = header.model_dump(include={"params", "inputs", "seed", "torch", "metrics", "sha256", "header_sha256"})
    return Description(
        architecture=classifier.about.architecture,
        facts=classifier.about.facts,
        advmoe=version("advmoe"),
        schema_version=header.schema_version,
        provenance=Provenance(**origin, training=_training(artifact, header), export=_export()),
    )


def _training(artifact: Path, header: Header) -> Training | None:
    """The circumstances in the sidecar; None without one, or if it is that of another artifact."""
    path = artifacts.sidecar(artifact)
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping, found {type(content).__name__}")
    if content.get("sha256") != header.sha256:
        return None
    return validate(_only(content, Training.model_fields), Training, str(path))


def _export() -> Export:
    now = {**artifacts.circumstances(0.0), "packages": _versions(PACKAGES)}
    return Export(**_only(now, Export.model_fields))


def _only(content: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A list of what may leave is safe, one of what may not would miss the next key."""
    return {key: content[key] for key in keys if key in content}


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that this export did not need
            continue
    return found

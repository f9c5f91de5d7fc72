"""The description that an export carries: architecture, inputs of the training, and software versions.

An artifact holds nothing that differs between two equal runs. An export is used without the project's history, so it
adds commit and package versions, but not the host name.
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
from advmoe.models.classifiers import Classifier, ClassifierMetadata

PACKAGES = ("advmoe", "huggingface_hub", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors", "torch")


class Environment(Settings):
    """`commit` is None outside git; `dirty`: tracked files differed from the commit."""

    commit: str | None
    dirty: bool | None
    python: str


class TrainingEnvironment(Environment):
    """The environment of training: number of threads, duration in seconds."""

    threads: int
    seconds: float


class ExportEnvironment(Environment):
    """The environment of the export: versions of the installed `packages`."""

    packages: dict[str, str]


class Provenance(Settings):
    """The origin of a network.

    The first seven fields are those of the artifact's header (`advmoe.core.artifacts.Header`). `training` is None if
    the artifact has no sidecar file, for example after `dvc pull`.
    """

    params: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    torch: str
    metrics: dict[str, Any]
    sha256: str
    header_sha256: str
    training: TrainingEnvironment | None
    export: ExportEnvironment


class Description(ClassifierMetadata):
    """Architecture and data set facts, as in the artifact, with their provenance."""

    advmoe: str
    schema_version: int
    provenance: Provenance


def describe(artifact: Path, classifier: Classifier) -> Description:
    """Describes a `classifier` that was read from the file `artifact`.

    Raises UserError when the artifact's sidecar file exists but cannot be read.
    """
    header = classifier.header
    origin = header.model_dump(include={"params", "inputs", "seed", "torch", "metrics", "sha256", "header_sha256"})
    return Description(
        architecture=classifier.about.architecture,
        facts=classifier.about.facts,
        advmoe=version("advmoe"),
        schema_version=header.schema_version,
        provenance=Provenance(**origin, training=_training_environment(artifact, header), export=_export_environment()),
    )


def _training_environment(artifact: Path, header: Header) -> TrainingEnvironment | None:
    """The environment in the sidecar file; None if it is missing or belongs to another artifact."""
    path = artifacts.sidecar_path(artifact)
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping, found {type(content).__name__}")
    if content.get("sha256") != header.sha256:
        return None
    return validate(_select(content, TrainingEnvironment.model_fields), TrainingEnvironment, str(path))


def _export_environment() -> ExportEnvironment:
    now = {**artifacts.run_provenance(0.0), "packages": _versions(PACKAGES)}
    return ExportEnvironment(**_select(now, ExportEnvironment.model_fields))


def _select(content: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Keeps the listed keys only, so that a new key is never exported by accident."""
    return {key: content[key] for key in keys if key in content}


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of the installed packages."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an optional package
            continue
    return versions

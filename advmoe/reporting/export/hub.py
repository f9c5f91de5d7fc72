"""Exports a classifier as a folder for the Hugging Face Hub, and reads such a folder.

`model.safetensors` is a byte-identical copy of the artifact and can be used in its place. `config.json` holds its
description, `README.md` the model card. Reading a folder does not execute code from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save as to_safetensors
from torch import Tensor

from advmoe.core import artifacts
from advmoe.core.artifacts import METADATA_KEY, Header
from advmoe.core.errors import UserError
from advmoe.core.files import canonical_json, read_json, write_bytes, write_json, write_text
from advmoe.core.settings import validate
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier
from advmoe.reporting.export.folders import atomic_folder
from advmoe.reporting.export.provenance import Description, describe

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # file names that the Hub recognises
FILES = (WEIGHTS, CONFIG, CARD)


class ExportedModel(NamedTuple):
    """The content of an exported folder; `card` is empty if there is no README.md."""

    classifier: Classifier
    description: Description
    card: str


def export_hub(artifact: Path, folder: Path, card: str) -> None:
    """Exports the classifier in `artifact` with its model `card` (Markdown) to `folder`; replaces an earlier export.

    Raises UserError when the artifact is missing, damaged or not a classifier, and when `folder` holds anything but an
    earlier export or cannot be written. Deterministic for equal input, code and packages.
    """
    classifier = classifiers.load(artifact)
    _check_replaceable(folder)
    description = describe(artifact, classifier)
    with atomic_folder(folder) as fresh:
        write(fresh, ExportedModel(classifier, description, card))


def find_model_card(artifact: Path) -> str:
    """Returns the model card next to an artifact, as the report stage writes for the mixture; else an empty string."""
    return _read_card(artifact.with_suffix(".md"))


def write(folder: Path, model: ExportedModel) -> None:
    """Writes the files of an exported model. Raises UserError when the weights do not match the header's hash."""
    tensors = {
        name: tensor.detach().cpu() for name, tensor in classifiers.state_dict_of(model.classifier.model).items()
    }
    if artifacts.hash_tensors(tensors) != model.classifier.header.sha256:
        raise UserError("the weights were changed after loading and do not match the recorded provenance")
    write_bytes(folder / WEIGHTS, _serialise_weights(tensors, model.classifier.header))
    write_json(folder / CONFIG, model.description.model_dump(mode="json"))
    if model.card:
        write_text(folder / CARD, model.card)


def _serialise_weights(tensors: Mapping[str, Tensor], header: Header) -> bytes:
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return to_safetensors(plain, metadata={METADATA_KEY: canonical_json(header.model_dump())})


def read(folder: Path) -> ExportedModel:
    """Reads an exported folder.

    Raises UserError when a file is missing or damaged, or the description does not match the weights.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not an export of advmoe, {name} is missing")
    classifier = classifiers.load(folder / WEIGHTS)
    description = validate(read_json(folder / CONFIG), Description, str(folder / CONFIG))
    if not _is_consistent(classifier, description):
        raise UserError(f"{folder}: {CONFIG} does not describe the network in {WEIGHTS}")
    return ExportedModel(classifier, description, _read_card(folder / CARD))


def _is_consistent(classifier: Classifier, description: Description) -> bool:
    about, header, origin = classifier.about, classifier.header, description.provenance
    same_network = (description.architecture, description.facts) == (about.architecture, about.facts)
    return same_network and (origin.sha256, origin.header_sha256) == (header.sha256, header.header_sha256)


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def _check_replaceable(folder: Path) -> None:
    """Raises UserError unless `folder` is missing, empty or an earlier export: replacing it deletes its content."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; an export for the Hub needs a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    other = [name for name in names if name not in FILES]
    if other:
        raise UserError(f"{folder}: holds '{other[0]}', which is not part of an export; name a new or empty folder")
    if names and not _is_export(folder):
        raise UserError(f"{folder}: is neither empty nor an earlier export; name a new or empty folder")


def _is_export(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    content = read_json(folder / CONFIG)
    return isinstance(content, dict) and {"advmoe", "provenance"} <= content.keys()

"""A classifier as a folder that the Hugging Face Hub takes.

`model.safetensors` is the artifact itself, to the byte, so every command of advmoe that reads an artifact reads it too.
`config.json` is its description, `README.md` the model card. Reading such a folder runs no code that lies in it.
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
from advmoe.reporting.export.folders import whole_folder
from advmoe.reporting.export.provenance import Description, describe

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # the names that the Hub gives a meaning to
FILES = (WEIGHTS, CONFIG, CARD)


class Pack(NamedTuple):
    """What an exported folder holds; `card` is empty if the folder has none."""

    classifier: Classifier
    description: Description
    card: str


def export_hub(artifact: Path, folder: Path, card: str) -> None:
    """Write the classifier in `artifact` and its model `card` (Markdown) to `folder`; an earlier export is replaced.

    Raises UserError when the artifact is missing, damaged or no classifier, when `folder` holds anything but an
    earlier export, or cannot be written. Equal input, code and packages give equal bytes.
    """
    classifier = classifiers.load(artifact)
    _refuse_strangers(folder)
    description = describe(artifact, classifier)
    with whole_folder(folder) as fresh:
        write(fresh, Pack(classifier, description, card))


def card_beside(artifact: Path) -> str:
    """The model card that lies beside an artifact, as the report stage writes one for the mixture; else nothing."""
    path = artifact.with_suffix(".md")
    return _read_card(path)


def write(folder: Path, pack: Pack) -> None:
    """Write the files of a pack.

    Raises UserError when the weights are no longer those that the header describes.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in classifiers.state_dict_of(pack.classifier.model).items()}
    if artifacts.hash_tensors(tensors) != pack.classifier.header.sha256:
        raise UserError("the weights were changed after loading, so what the file says of their origin is not true")
    write_bytes(folder / WEIGHTS, _as_artifact(tensors, pack.classifier.header))
    write_json(folder / CONFIG, pack.description.model_dump(mode="json"))
    if pack.card:
        write_text(folder / CARD, pack.card)


def _as_artifact(tensors: Mapping[str, Tensor], header: Header) -> bytes:
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return to_safetensors(plain, metadata={METADATA_KEY: canonical_json(header.model_dump())})


def read(folder: Path) -> Pack:
    """Read an exported folder.

    Raises UserError when it lacks a file, a file is damaged, or the description is not that of the weights.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no export of advmoe, it has no {name}")
    classifier = classifiers.load(folder / WEIGHTS)
    description = validate(read_json(folder / CONFIG), Description, str(folder / CONFIG))
    if not _belong_together(classifier, description):
        raise UserError(f"{folder}: {CONFIG} describes another network than {WEIGHTS} holds")
    return Pack(classifier, description, _read_card(folder / CARD))


def _belong_together(classifier: Classifier, description: Description) -> bool:
    about, header, origin = classifier.about, classifier.header, description.provenance
    same_network = (description.architecture, description.facts) == (about.architecture, about.facts)
    return same_network and (origin.sha256, origin.header_sha256) == (header.sha256, header.header_sha256)


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def _refuse_strangers(folder: Path) -> None:
    """Replacing a folder removes what is in it: only an earlier export may go."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; an export for the Hub needs a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    strangers = [name for name in names if name not in FILES]
    if strangers:
        raise UserError(f"{folder}: holds '{strangers[0]}', which no export wrote; name a new or empty folder")
    if names and not _is_export(folder):
        raise UserError(f"{folder}: is neither empty nor an earlier export; name a new or empty folder")


def _is_export(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    content = read_json(folder / CONFIG)
    return isinstance(content, dict) and {"advmoe", "provenance"} <= content.keys()

"""Loads models and images that are not part of this project.

Only the `.py` file that the user names as `path/to/model.py:factory` runs code. Weights are read as safetensors or by
`torch.load(weights_only=True)`, data as npz without pickle.

Shapes: N images, C channel, H/W pixels, K classes.
"""

import hashlib
import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn

from advmoe.core import console, user_code
from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError, error_summary
from advmoe.data.dataset import Split
from advmoe.data.sources.npz import read_npz
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier, MixtureArchitecture
from advmoe.models.mixture import MixtureOfExperts


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode. `identity`: a hash; `artifact`: its classifier file, None for an external model."""

    name: str
    model: nn.Module
    identity: str
    artifact: Classifier | None


def load_model(model: str, weights: Path | None, expert: str | None) -> LoadedModel:
    """Loads a classifier artifact, one of its experts, or an external model `path/to/model.py:factory`.

    Raises UserError if a file is missing or invalid, the factory raises, or the expert does not exist.
    """
    if user_code.is_code_reference(model):
        if expert is not None:
            raise UserError(f"--expert {expert}: only artifacts of advmoe have named experts, {model} is code")
        return external_model(model, call_factory(model), weights)
    if weights is not None:
        raise UserError(f"--weights: {model} contains its weights; use --weights with --model path/to/model.py:factory")
    if not model.endswith(".safetensors"):
        raise UserError(f"--model {model}: must be an artifact (.safetensors) or path/to/model.py:factory")
    return _load_artifact(Path(model), expert)


def _load_artifact(path: Path, expert: str | None) -> LoadedModel:
    classifier = classifiers.load(path)
    if expert is None:
        return LoadedModel(path.stem, classifier.model, classifier.header.sha256, classifier)
    architecture = classifier.about.architecture
    names = architecture.experts if isinstance(architecture, MixtureArchitecture) else ()
    if expert not in names:
        known = f"it has {', '.join(names)}" if names else "it is a single network"
        raise UserError(f"--expert {expert}: {path} has no such expert; {known}")
    assert isinstance(classifier.model, MixtureOfExperts)
    return LoadedModel(expert, classifier.model.experts[names.index(expert)], classifier.header.sha256, classifier)


def call_factory(reference: str) -> Any:
    """Calls the factory `path/to/model.py:factory`. Raises UserError if it is missing or raises."""
    return user_code.call(reference, user_code.load_function(reference))


def external_model(reference: str, model: object, weights: Path | None) -> LoadedModel:
    """Wraps the result of a factory, with weights. Raises UserError if it is no module or the weights do not fit."""
    if not isinstance(model, nn.Module):
        raise UserError(f"{reference}: must return a torch.nn.Module, not {type(model).__name__}")
    identity = user_code.file_digest(reference)
    if weights is not None:
        _load_weights(model, weights)
        identity += hashlib.sha256(weights.read_bytes()).hexdigest()
    else:
        console.warn(f"no --weights: the model is evaluated as {reference} returns it")
    return LoadedModel(
        reference.rpartition(":")[0].rpartition("/")[2].removesuffix(".py"), model.eval(), identity, None
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights into `model`. Raises UserError with the first name that does not fit."""
    state_dict = read_weights(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Casting complex values")  # the imaginary part would be dropped
            problems = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # shapes, and types that cannot be converted
        raise UserError(f"{path}: does not fit the model ({' '.join(str(error).split())})") from error
    # a counter that is not used in eval mode and missing in many files
    missing = [name for name in problems.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or problems.unexpected_keys:
        what = f"lacks '{missing[0]}'" if missing else f"has '{problems.unexpected_keys[0]}', which the model lacks"
        raise UserError(f"{path}: does not fit the model: it {what}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from .safetensors, .pt or .pth without running code. Raises UserError if it is invalid."""
    try:
        content: Any = from_safetensors(path.read_bytes()) if path.suffix == ".safetensors" else _torch_load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:  # PyTorch's message recommends loading with weights_only=False
        raise UserError(
            f"{path}: cannot be read as weights without running code (it contains more than tensors; nothing was run)"
        ) from error
    except UserError:
        raise
    except (SafetensorError, struct.error, *MALFORMED_INPUT_ERRORS) as error:
        raise UserError(f"{path}: cannot be read as weights without running code ({error_summary(error)})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: contains no state dict (names to tensors)")
    return dict(content)


def _torch_load(path: Path) -> Any:
    if path.suffix not in {".pt", ".pth"}:
        raise UserError(f"{path}: weights must be .safetensors, .pt or .pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats that weights_only rejects
        return torch.load(path, map_location="cpu", weights_only=True)


def load_images(path: Path, limit: int | None) -> Split:
    """Returns the first `limit` images of an npz file. Raises UserError if the file is invalid."""
    labelled, _ = read_npz(path)
    if (labelled.labels < 0).any():
        raise UserError(f"{path}: labels must not be negative, found {labelled.labels.min()}")
    images, labels = torch.from_numpy(labelled.images), torch.from_numpy(labelled.labels)
    return Split(images, labels, torch.arange(len(labels))).first(limit)


def check_forward(loaded: LoadedModel, split: Split) -> int:
    """Returns the number of classes, from one forward pass. Raises UserError if model and images do not fit."""
    with torch.no_grad():
        try:
            logits = loaded.model(split.pixels()[:1])
        except Exception as error:
            shape = tuple(split.images.shape[1:])
            raise UserError(f"{loaded.name}: cannot take images of shape {shape} ({error_summary(error)})") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{loaded.name}: must map images (B, C, H, W) to logits (B, K), but returned {returned}")
    classes, highest = logits.shape[1], int(split.labels.max())
    if highest >= classes:
        raise UserError(f"{loaded.name}: outputs {classes} classes, but labels go up to {highest}")
    if highest + 1 < classes:
        console.warn(f"{loaded.name} outputs {classes} classes, labels go up to {highest} only")
    return classes

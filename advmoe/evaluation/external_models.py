"""Anybody's model and images, loaded for an evaluation.

What runs code: the `.py` file that the user names as `path/to/model.py:factory`, and nothing else. Weights are read as
safetensors or by `torch.load(weights_only=True)`, data as npz without pickle.

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
from advmoe.core.errors import STUMBLES, UserError, first_line
from advmoe.data.dataset import Split
from advmoe.data.sources.npz import read_npz
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier, Mixture
from advmoe.models.mixture import MixtureOfExperts


@dataclass(frozen=True)
class LoadedModel:
    """A model to evaluate, in eval mode. `artifact`: the classifier file it came from, None for a stranger."""

    name: str
    model: nn.Module
    identity: str
    artifact: Classifier | None


def load_model(model: str, weights: Path | None, expert: str | None) -> LoadedModel:
    """A classifier artifact, one expert of it, or a stranger's `path/to/model.py:factory` with its weights.

    Raises UserError when a file is missing or unfit, the factory raises, or the expert is not there.
    """
    if user_code.names_code(model):
        if expert is not None:
            raise UserError(f"--expert {expert}: only an artifact of advmoe has experts by name, {model} is code")
        return stranger(model, made_by(model), weights)
    if weights is not None:
        raise UserError(f"--weights: {model} brings its own; weights belong to --model path/to/model.py:factory")
    if not model.endswith(".safetensors"):
        raise UserError(f"--model {model}: must be an artifact (.safetensors) or path/to/model.py:factory")
    return _artifact(Path(model), expert)


def _artifact(path: Path, expert: str | None) -> LoadedModel:
    classifier = classifiers.load(path)
    if expert is None:
        return LoadedModel(path.stem, classifier.model, classifier.header.sha256, classifier)
    architecture = classifier.about.architecture
    names = architecture.experts if isinstance(architecture, Mixture) else ()
    if expert not in names:
        known = f"it has {', '.join(names)}" if names else "it is a single network"
        raise UserError(f"--expert {expert}: {path} has no such expert; {known}")
    assert isinstance(classifier.model, MixtureOfExperts)
    return LoadedModel(expert, classifier.model.experts[names.index(expert)], classifier.header.sha256, classifier)


def made_by(reference: str) -> Any:
    """What a stranger's factory returns. Raises UserError when it is not there or raises."""
    return user_code.call(reference, user_code.load_function(reference))


def stranger(reference: str, model: object, weights: Path | None) -> LoadedModel:
    """A network that a factory made, with its weights. Raises UserError when it is none, or they do not fit."""
    if not isinstance(model, nn.Module):
        raise UserError(f"{reference}: must return a torch.nn.Module, not {type(model).__name__}")
    identity = user_code.digest(reference)
    if weights is not None:
        _fill(model, weights)
        identity += hashlib.sha256(weights.read_bytes()).hexdigest()
    else:
        console.warn(f"no --weights: the model is evaluated as {reference} returns it")
    return LoadedModel(
        reference.rpartition(":")[0].rpartition("/")[2].removesuffix(".py"), model.eval(), identity, None
    )


def _fill(model: nn.Module, path: Path) -> None:
    """Load weights into a stranger's model. Raises UserError with the first name that does not fit."""
    found = read_weights(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Casting complex values")  # their imaginary part would be dropped
            problems = model.load_state_dict(found, strict=False)
    except RuntimeError as error:  # shapes, and types that cannot be converted
        raise UserError(f"{path}: does not fit the model ({' '.join(str(error).split())})") from error
    # a counter that nothing reads, and that many files leave out
    missing = [name for name in problems.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or problems.unexpected_keys:
        what = f"lacks '{missing[0]}'" if missing else f"has '{problems.unexpected_keys[0]}', which the model has not"
        raise UserError(f"{path}: does not fit the model: it {what}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pt/.pth without running any code. Raises UserError if it is unusable."""
    try:
        content: Any = from_safetensors(path.read_bytes()) if path.suffix == ".safetensors" else _torch_load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:  # PyTorch's own sentence recommends to run what it refused
        raise UserError(
            f"{path}: cannot be read as weights without running code (it holds more than tensors; nothing was run)"
        ) from error
    except UserError:
        raise
    except (SafetensorError, struct.error, *STUMBLES) as error:
        raise UserError(f"{path}: cannot be read as weights without running code ({first_line(error)})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict (names to tensors)")
    return dict(content)


def _torch_load(path: Path) -> Any:
    if path.suffix not in {".pt", ".pth"}:
        raise UserError(f"{path}: weights must be .safetensors, .pt or .pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats that weights_only refuses anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def load_images(path: Path, limit: int | None) -> Split:
    """The first `limit` images of an npz as a split. Raises UserError when the file is unusable."""
    labelled, _ = read_npz(path)
    if (labelled.labels < 0).any():
        raise UserError(f"{path}: labels must not be negative, found {labelled.labels.min()}")
    images, labels = torch.from_numpy(labelled.images), torch.from_numpy(labelled.labels)
    return Split(images, labels, torch.arange(len(labels))).first(limit)


def check_forward(subject: LoadedModel, split: Split) -> int:
    """The number of classes, from one image. Raises UserError when the model cannot take these images."""
    with torch.no_grad():
        try:
            logits = subject.model(split.pixels()[:1])
        except Exception as error:
            shape = tuple(split.images.shape[1:])
            raise UserError(f"{subject.name}: cannot take images of shape {shape} ({first_line(error)})") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        gave = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{subject.name}: must map images (B, C, H, W) to logits (B, K), but gave {gave}")
    classes, highest = logits.shape[1], int(split.labels.max())
    if highest >= classes:
        raise UserError(f"{subject.name}: outputs {classes} classes, but labels go up to {highest}")
    if highest + 1 < classes:
        console.warn(f"{subject.name} outputs {classes} classes, labels go up to {highest} only")
    return classes

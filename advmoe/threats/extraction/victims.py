"""Whatever is asked: a network of this project, anybody's network, or a function that passes images to an endpoint.

The small interface is a function from uint8 images (N, C, H, W) to probabilities (N, K), or to classes (N,) where
nothing else is told. A `path/to/file.py:factory` may return such a function in place of a network.

Shapes: N images, C channel, H/W pixels, K classes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from advmoe.core import paths, user_code
from advmoe.core.errors import UserError
from advmoe.core.settings import PIXEL_LEVELS
from advmoe.data.dataset import Facts, Split, digests
from advmoe.evaluation import external_models
from advmoe.models import inference
from advmoe.runtime.machine import device
from advmoe.threats.extraction.oracle import Ask
from advmoe.threats.extraction.query_cache import QueryCache
from advmoe.threats.victim_training import MIXTURE

BATCH = 200  # images that a victim is asked about at once
SUM_TOLERANCE = 1e-3  # of probabilities, which an endpoint may have rounded
EXPERT = "expert/"
KEY_LENGTH = 16  # hex digits of a folder's name


@dataclass(frozen=True)
class Victim:
    """`ask`: the interface above, checked. `model`: the network behind it; where there is only a function it is None,
    and `paid` holds the answers.
    """

    name: str
    identity: str
    ask: Ask
    model: nn.Module | None
    paid: QueryCache | None = None


def load(name: str, weights: Path | None, facts: Facts) -> Victim:
    """`mixture`, a baseline's name, `expert/NAME`, an artifact's path, or `path/to/file.py:factory` with its weights.

    Raises UserError when it is not there, cannot be loaded, or is not made for such images and classes.
    """
    if user_code.names_code(name):
        return _stranger(name, weights, facts)
    if weights is not None:
        raise UserError(f"--weights: {name} brings its own; weights belong to --victim path/to/file.py:factory")
    path = file_of(name)
    if not path.exists():
        raise UserError(
            f"victim '{name}': there is no {path}; a victim is {MIXTURE}, a baseline of params.yaml, {EXPERT}NAME, a "
            ".safetensors file of this project or path/to/file.py:factory"
        )
    subject = external_models.load_model(str(path), None, None)
    assert subject.artifact is not None
    own = subject.artifact.about.facts
    if own.classes != facts.classes:
        raise UserError(f"{name}: knows {own.classes} classes, but the data has {facts.classes}")
    if _shape(own) != _shape(facts):
        raise UserError(f"{name}: takes images of {_shape(own)}, but the data has {_shape(facts)}")
    shown = Path(name).stem if name.endswith(".safetensors") else name
    return _network(shown, subject.identity, subject.model, facts.classes)


def file_of(name: str) -> Path:
    """The artifact that a name of params.yaml means; a path is one already."""
    if name == MIXTURE:
        return paths.MIXTURE
    if name.endswith(".safetensors"):
        return Path(name)
    if name.startswith(EXPERT):
        return paths.artifact("pretrain", name.removeprefix(EXPERT))
    return paths.artifact("baseline", name)


def _shape(facts: Facts) -> tuple[int, int, int]:
    return facts.channels, facts.height, facts.width


def _stranger(reference: str, weights: Path | None, facts: Facts) -> Victim:
    made = external_models.made_by(reference)
    name = reference.rpartition(":")[0].rpartition("/")[2].removesuffix(".py")
    if isinstance(made, nn.Module):
        subject = external_models.stranger(reference, made, weights)
        black, last = torch.zeros(1, *_shape(facts), dtype=torch.uint8), torch.tensor([facts.classes - 1])
        one = Split(black, last, torch.zeros(1))
        told = external_models.check_forward(subject, one)
        if told != facts.classes:
            raise UserError(f"{reference}: knows {told} classes, but the data has {facts.classes}")
        return _network(name, subject.identity, subject.model, facts.classes)
    if not callable(made):
        raise UserError(f"{reference}: must return a network or a function of images, not {type(made).__name__}")
    if weights is not None:
        raise UserError(f"--weights: {reference} returns a function, and a function has no weights")
    identity = user_code.digest(reference)
    folder = paths.PAID / hashlib.sha256(f"{reference}{identity}".encode()).hexdigest()[:KEY_LENGTH]
    paid = QueryCache(folder)
    return Victim(name, identity, _Remembering(reference, made, facts.classes, paid), None, paid)


def _network(name: str, identity: str, model: nn.Module, classes: int) -> Victim:
    here = model.eval().to(device())

    def ask(images_NCHW: Tensor) -> Tensor:
        logits = inference.predict(here, images_NCHW.to(device()).float() / PIXEL_LEVELS, BATCH)
        return check(torch.softmax(logits.double(), dim=1).float(), len(images_NCHW), classes, name)

    return Victim(name, identity, ask, here)


class _Remembering:
    """A user's function, its answers checked and kept on disk: they may have cost money."""

    def __init__(self, reference: str, function: Callable[[Tensor], object], classes: int, paid: QueryCache) -> None:
        self.reference, self.function, self.classes, self.paid = reference, function, classes, paid

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        return torch.cat([self._batch(batch) for batch in torch.split(images_NCHW, BATCH)])

    def _batch(self, images_NCHW: Tensor) -> Tensor:
        keys = digests(images_NCHW)
        # an image that occurs twice in a batch is asked once
        new = {
            key: row for row, (key, known) in enumerate(zip(keys, self.paid.known(keys), strict=True)) if known is None
        }
        if new:
            told = user_code.call(self.reference, self.function, images_NCHW[list(new.values())])
            self.paid.add(list(new), check(told, len(new), self.classes, self.reference))
        return torch.stack([answer for answer in self.paid.known(keys) if answer is not None])


def check(told: object, images: int, classes: int, who: str) -> Tensor:
    """Probabilities (N, K) as float32; classes (N,) become one-hot. Raises UserError for what is neither."""
    if not isinstance(told, Tensor):
        raise UserError(f"{who}: must answer with a tensor, not {type(told).__name__}")
    told = told.detach().cpu()
    if told.shape == (images,) and not told.is_floating_point():
        wrong = told[(told < 0) | (told >= classes)].tolist()
        if wrong:
            raise UserError(f"{who}: names class {wrong[0]}, but the data has {classes}")
        return nn.functional.one_hot(told.long(), classes).float()
    if told.shape != (images, classes):
        raise UserError(
            f"{who}: must answer {images} images with {images} x {classes} numbers, gave {tuple(told.shape)}"
        )
    told = told.float()
    if not told.isfinite().all() or bool((told < 0).any()) or bool(((told.sum(1) - 1).abs() > SUM_TOLERANCE).any()):
        raise UserError(f"{who}: must answer with probabilities: finite, not negative, a sum of 1 for every image")
    return told

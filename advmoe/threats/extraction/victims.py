"""Victims of extraction: a network of this project, an external network, or a function that queries an endpoint.

The query interface is a function from uint8 images (N, C, H, W) to probabilities (N, K) or, for label-only victims,
to classes (N,). A `path/to/file.py:factory` may return such a function instead of a network.

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
from advmoe.data.dataset import DatasetInfo, Split, image_digests
from advmoe.evaluation import external_models
from advmoe.models import inference
from advmoe.runtime.machine import device
from advmoe.threats.extraction.oracle import QueryFn
from advmoe.threats.extraction.query_cache import QueryCache
from advmoe.threats.victim_training import MIXTURE

BATCH_SIZE = 200  # images per query batch
SUM_TOLERANCE = 1e-3  # of the sum of probabilities: an endpoint may round them
CACHE_KEY_LENGTH = 16  # hex digits of a folder's name


@dataclass(frozen=True)
class Victim:
    """A victim. `query`: the interface above, with checked answers; `model`: the network, None for a function;
    `cache`: the answers of a function, None for a network.
    """

    name: str
    identity: str
    query: QueryFn
    model: nn.Module | None
    cache: QueryCache | None = None


def load(name: str, weights: Path | None, facts: DatasetInfo) -> Victim:
    """Loads `mixture`, a baseline by name, `expert/NAME`, an artifact by path, or `path/to/file.py:factory`.

    Raises UserError when the victim does not exist, cannot be loaded, or does not fit the images and classes.
    """
    if user_code.is_code_reference(name):
        return _external_victim(name, weights, facts)
    if weights is not None:
        raise UserError(f"--weights: {name} has weights already; --weights is for --victim path/to/file.py:factory")
    path = paths.model(name)
    if not path.exists():
        raise UserError(
            f"victim '{name}': {path} does not exist; a victim is {MIXTURE}, a baseline of params.yaml, "
            f"{paths.EXPERT_PREFIX}NAME, a .safetensors file of this project or path/to/file.py:factory"
        )
    loaded = external_models.load_model(str(path), None, None)
    assert loaded.artifact is not None
    own = loaded.artifact.about.facts
    if own.classes != facts.classes:
        raise UserError(f"{name}: has {own.classes} classes, but the data has {facts.classes}")
    if _image_shape(own) != _image_shape(facts):
        raise UserError(f"{name}: takes images of {_image_shape(own)}, but the data has {_image_shape(facts)}")
    short_name = Path(name).stem if name.endswith(".safetensors") else name
    return _network_victim(short_name, loaded.identity, loaded.model, facts.classes)


def _image_shape(facts: DatasetInfo) -> tuple[int, int, int]:
    return facts.channels, facts.height, facts.width


def _external_victim(reference: str, weights: Path | None, facts: DatasetInfo) -> Victim:
    made = external_models.call_factory(reference)
    name = reference.rpartition(":")[0].rpartition("/")[2].removesuffix(".py")
    if isinstance(made, nn.Module):
        loaded = external_models.external_model(reference, made, weights)
        image, label = torch.zeros(1, *_image_shape(facts), dtype=torch.uint8), torch.tensor([facts.classes - 1])
        classes = external_models.check_forward(loaded, Split(image, label, torch.zeros(1)))
        if classes != facts.classes:
            raise UserError(f"{reference}: has {classes} classes, but the data has {facts.classes}")
        return _network_victim(name, loaded.identity, loaded.model, facts.classes)
    if not callable(made):
        raise UserError(f"{reference}: must return a network or a function of images, not {type(made).__name__}")
    if weights is not None:
        raise UserError(f"--weights: {reference} returns a function, which has no weights")
    identity = user_code.file_digest(reference)
    folder = paths.PAID_QUERIES / hashlib.sha256(f"{reference}{identity}".encode()).hexdigest()[:CACHE_KEY_LENGTH]
    cache = QueryCache(folder)
    return Victim(name, identity, _CachedFunction(reference, made, facts.classes, cache), None, cache)


def _network_victim(name: str, identity: str, model: nn.Module, classes: int) -> Victim:
    network = model.eval().to(device())

    def query(images_NCHW: Tensor) -> Tensor:
        logits = inference.predict(network, images_NCHW.to(device()).float() / PIXEL_LEVELS, BATCH_SIZE)
        return check_answers(torch.softmax(logits.double(), dim=1).float(), len(images_NCHW), classes, name)

    return Victim(name, identity, query, network)


class _CachedFunction:
    """A user's query function; its answers are checked and cached on disk, since queries may cost money."""

    def __init__(self, reference: str, function: Callable[[Tensor], object], classes: int, cache: QueryCache) -> None:
        self.reference, self.function, self.classes, self.cache = reference, function, classes, cache

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        return torch.cat([self._batch(batch) for batch in torch.split(images_NCHW, BATCH_SIZE)])

    def _batch(self, images_NCHW: Tensor) -> Tensor:
        keys = image_digests(images_NCHW)
        # an image that occurs twice in a batch is sent once
        cached = self.cache.lookup(keys)
        new = {key: row for row, (key, answer) in enumerate(zip(keys, cached, strict=True)) if answer is None}
        if new:
            answers = user_code.call(self.reference, self.function, images_NCHW[list(new.values())])
            self.cache.add(list(new), check_answers(answers, len(new), self.classes, self.reference))
        return torch.stack([answer for answer in self.cache.lookup(keys) if answer is not None])


def check_answers(answers: object, images: int, classes: int, source: str) -> Tensor:
    """Returns probabilities (N, K) as float32 on the CPU; classes (N,) become one-hot.

    `images`: N; `source`: named in errors. Raises UserError for other shapes or values.
    """
    if not isinstance(answers, Tensor):
        raise UserError(f"{source}: must return a tensor, not {type(answers).__name__}")
    answers = answers.detach().cpu()
    if answers.shape == (images,) and not answers.is_floating_point():
        invalid = answers[(answers < 0) | (answers >= classes)].tolist()
        if invalid:
            raise UserError(f"{source}: returned class {invalid[0]}, but the data has {classes} classes")
        return nn.functional.one_hot(answers.long(), classes).float()
    if answers.shape != (images, classes):
        raise UserError(
            f"{source}: must return {images} x {classes} numbers for {images} images, not {tuple(answers.shape)}"
        )
    answers = answers.float()
    if (
        not answers.isfinite().all()
        or bool((answers < 0).any())
        or bool(((answers.sum(1) - 1).abs() > SUM_TOLERANCE).any())
    ):
        raise UserError(f"{source}: must return probabilities: finite, not negative, with sum 1 for every image")
    return answers

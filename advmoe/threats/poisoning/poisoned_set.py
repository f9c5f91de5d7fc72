"""A poisoned training set: the images and labels that victims learn from, and the record of what was changed.

It is made once, as an array of bytes, before any augmentation: poison that is drawn afresh each epoch, or stamped after
a crop, is another and stronger attack than the one whose rate is reported.

Shapes: N training images, M poisoned ones, C channel, H/W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.core.settings import Seed, Settings, validate
from advmoe.runtime.checkpoints.storage import Checkpoint

KIND = "poisoned-set"
FIELDS = ("images", "labels", "rows", "true_labels")
TRIGGER = ("opacity", "pattern")  # both or neither


@dataclass(frozen=True)
class Trigger:
    """What is laid over an image: `opacity` (C, H, W) in [0, 1] of the `pattern` (C, H, W) uint8."""

    opacity: Tensor
    pattern: Tensor

    def stamp(self, images_NCHW: Tensor) -> Tensor:
        """uint8 images with the trigger on them, (N, C, H, W)."""
        mixed = (1 - self.opacity) * images_NCHW.float() + self.opacity * self.pattern.float()
        return mixed.round().to(torch.uint8)


class Goal(Settings):
    """What the attacker wants at test time. `target`: the class to be answered; `source`: only for images of this one.

    Neither is set for attacks that merely want to do harm.
    """

    target: int | None = None
    source: int | None = None


@dataclass(frozen=True)
class Poisoned:
    """`images` (N, C, H, W) uint8 and `labels` (N,) to train on.

    `rows` (M,): positions in this set of what was changed, in rising order; `true_labels` (M,): what those images show.
    `of`: what the attack's rate is a share of, in words, and `available`: how many images that is. `trigger`: what
    activates a backdoor; `wanted_image` (C, H, W) uint8: the one test image that is to be misclassified.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    true_labels: Tensor
    of: str
    available: int
    goal: Goal = field(default_factory=Goal)
    trigger: Trigger | None = None
    wanted_image: Tensor | None = None

    @property
    def is_poison(self) -> Tensor:
        """Whether each image (N,) was changed, or its label."""
        changed = torch.zeros(len(self.labels), dtype=torch.bool)
        changed[self.rows] = True
        return changed


def change(
    images_NCHW: Tensor,
    labels_N: Tensor,
    rows: Tensor,
    *,
    of: str,
    available: int,
    new_images: Tensor | None = None,
    new_labels: Tensor | None = None,
) -> Poisoned:
    """The set with `new_images` (M, C, H, W) or `new_labels` (M,) at `rows` (M,); the rest stays, byte for byte."""
    order = rows.argsort()
    images, labels, sorted_rows = images_NCHW.clone(), labels_N.clone(), rows[order]
    if new_images is not None:
        images[sorted_rows] = new_images[order]
    if new_labels is not None:
        labels[sorted_rows] = new_labels[order]
    return Poisoned(images, labels, sorted_rows, labels_N[sorted_rows], of, available)


def count(rate: float, available: int, of: str) -> int:
    """How many images a rate is. Raises UserError when it rounds to none."""
    number = round(rate * available)
    if not number:
        raise UserError(f"rate {rate:g} of {available} images ({of}) is not even one image")
    return number


def choose(candidates: Tensor, number: int, of: str, stream: torch.Generator) -> Tensor:
    """`number` of the candidate positions, at random; a higher number from an equal stream contains a lower one's.

    Raises UserError when there are not so many.
    """
    if number > len(candidates):
        raise UserError(f"{number} images should be poisoned, but {of} holds only {len(candidates)}")
    return candidates[torch.randperm(len(candidates), generator=stream)[:number]]


def members(labels_N: Tensor, label: int, classes: int) -> Tensor:
    """Positions of a class. Raises UserError when there is no such class, or no image of it."""
    if label >= classes:
        raise UserError(f"class {label} does not exist; the classes are 0 to {classes - 1}")
    found = (labels_N == label).nonzero().squeeze(1)
    if not len(found):
        raise UserError(f"class {label} has no training images")
    return found


class About(Settings):
    """What a poisoned set says of itself, besides its tensors. `added`: to the project's seed."""

    attack: str
    rate: float
    of: str
    available: int
    goal: Goal
    added: Seed
    trial: int


def save(
    path: Path,
    poisoned: Poisoned,
    about: About,
    *,
    params: Mapping[str, Any],
    dataset: str,
    seed: int,
    seconds: float,
) -> str:
    """Write the set as an artifact; returns its content hash."""
    written = artifacts.save(
        path,
        KIND,
        _tensors(poisoned),
        about=about.model_dump(mode="json"),
        params=params,
        inputs={"dataset": dataset},
        seed=seed,
        metrics={},
        seconds=seconds,
    )
    return written.sha256


def _tensors(poisoned: Poisoned) -> dict[str, Tensor]:
    trigger = poisoned.trigger
    optional = {
        "opacity": trigger.opacity if trigger else None,
        "pattern": trigger.pattern if trigger else None,
        "wanted_image": poisoned.wanted_image,
    }
    tensors = {name: getattr(poisoned, name) for name in FIELDS} | optional
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def load(path: Path) -> Poisoned:
    """Read a poisoned set. Raises UserError if it is missing, damaged or not one."""
    artifact = artifacts.load(path, KIND)
    about = validate(artifact.header.about, About, f"{path}: header")
    tensors = artifact.tensors
    needed = (*FIELDS, *(TRIGGER if set(TRIGGER) & set(tensors) else ()))
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{path}: has no tensor '{missing[0]}'; build it again")
    if not _fits(tensors):
        raise UserError(f"{path}: its tensors do not belong together; build it again")
    return _poisoned(tensors, about.of, about.available, about.goal)


def _poisoned(tensors: Mapping[str, Tensor], of: str, available: int, goal: Goal) -> Poisoned:
    return Poisoned(
        **{name: tensors[name] for name in FIELDS},
        of=of,
        available=available,
        goal=goal,
        trigger=Trigger(tensors["opacity"], tensors["pattern"]) if "opacity" in tensors else None,
        wanted_image=tensors.get("wanted_image"),
    )


def to_keep(poisoned: Poisoned) -> Checkpoint:
    """The set as unfinished work keeps it."""
    values = {"of": poisoned.of, "available": poisoned.available, "goal": poisoned.goal.model_dump()}
    return Checkpoint(_tensors(poisoned), values)


def as_kept(found: Checkpoint) -> Poisoned:
    """The set that was kept. Raises ValueError or KeyError for another thing."""
    values = found.values
    if not _fits(found.tensors):
        raise ValueError("its tensors do not belong together")
    return _poisoned(found.tensors, values["of"], values["available"], Goal(**values["goal"]))


def _fits(tensors: Mapping[str, Tensor]) -> bool:
    """Whether types and shapes are those that `save` writes."""
    images, labels, rows, true_labels = (tensors[name] for name in FIELDS)
    image = images.shape[1:]
    pictures = [tensors[name] for name in ("pattern", "wanted_image") if name in tensors]
    return (
        images.dtype == torch.uint8
        and images.ndim == 4
        and all(each.dtype == torch.int64 and each.ndim == 1 for each in (labels, rows, true_labels))
        and len(labels) == len(images)
        and len(rows) == len(true_labels)
        and bool(((rows >= 0) & (rows < len(images))).all())
        and bool((rows.diff() > 0).all())
        and all(each.dtype == torch.uint8 and each.shape == image for each in pictures)
        and ("opacity" not in tensors or _is_opacity(tensors["opacity"], image))
    )


def _is_opacity(opacity: Tensor, image: torch.Size) -> bool:
    return opacity.dtype == torch.float32 and opacity.shape == image and bool(((opacity >= 0) & (opacity <= 1)).all())

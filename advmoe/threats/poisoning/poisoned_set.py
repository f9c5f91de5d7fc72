"""The poisoned training set: images and labels that victims are trained on, which of them are poisoned, and its file.

It is made once, as uint8 images, before any augmentation: poison that is drawn in each epoch, or a trigger that is
stamped after a crop, is a different and stronger attack than the one whose rate is reported.

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
    """A pattern that is blended into images: `opacity` (C, H, W) in [0, 1] of `pattern` (C, H, W) uint8."""

    opacity: Tensor
    pattern: Tensor

    def stamp(self, images_NCHW: Tensor) -> Tensor:
        """Returns uint8 images with the trigger blended in, (N, C, H, W)."""
        mixed = (1 - self.opacity) * images_NCHW.float() + self.opacity * self.pattern.float()
        return mixed.round().to(torch.uint8)


class Goal(Settings):
    """The attacker's goal at test time: images, of class `source` if given, are classified as class `target`.

    Neither is set for attacks that only lower the accuracy.
    """

    target: int | None = None
    source: int | None = None


@dataclass(frozen=True)
class PoisonedSet:
    """`images` (N, C, H, W) uint8 and `labels` (N,) to train on.

    `rows` (M,): positions of the poisoned images, in ascending order; `true_labels` (M,): their original labels.
    `rate_of`: what the attack's rate is a share of, in words, and `available`: the number of images in it. `trigger`:
    the trigger of a backdoor; `target_image` (C, H, W) uint8: the one test image that is to be misclassified.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    true_labels: Tensor
    rate_of: str
    available: int
    goal: Goal = field(default_factory=Goal)
    trigger: Trigger | None = None
    target_image: Tensor | None = None

    @property
    def is_poison(self) -> Tensor:
        """Whether each image, or its label, is poisoned (N,)."""
        is_poison = torch.zeros(len(self.labels), dtype=torch.bool)
        is_poison[self.rows] = True
        return is_poison


def replace_rows(
    images_NCHW: Tensor,
    labels_N: Tensor,
    rows: Tensor,
    *,
    rate_of: str,
    available: int,
    new_images: Tensor | None = None,
    new_labels: Tensor | None = None,
) -> PoisonedSet:
    """Returns the set with `new_images` (M, C, H, W) or `new_labels` (M,) at `rows` (M,); all else is unchanged."""
    order = rows.argsort()
    images, labels, sorted_rows = images_NCHW.clone(), labels_N.clone(), rows[order]
    if new_images is not None:
        images[sorted_rows] = new_images[order]
    if new_labels is not None:
        labels[sorted_rows] = new_labels[order]
    return PoisonedSet(images, labels, sorted_rows, labels_N[sorted_rows], rate_of, available)


def poison_count(rate: float, available: int, rate_of: str) -> int:
    """Returns the number of images at a rate. Raises UserError when it rounds to zero."""
    number = round(rate * available)
    if not number:
        raise UserError(f"rate {rate:g} of {available} images ({rate_of}) rounds to zero images")
    return number


def sample_rows(candidates: Tensor, number: int, source: str, stream: torch.Generator) -> Tensor:
    """Samples `number` of the candidate positions without replacement; `source` names the candidates in messages.

    From equal streams, a higher number includes the rows of a lower one. Raises UserError for too few candidates.
    """
    if number > len(candidates):
        raise UserError(f"{number} images should be poisoned, but {source} holds only {len(candidates)}")
    return candidates[torch.randperm(len(candidates), generator=stream)[:number]]


def rows_of_class(labels_N: Tensor, label: int, classes: int) -> Tensor:
    """Returns the positions of a class. Raises UserError when there is no such class, or no image of it."""
    if label >= classes:
        raise UserError(f"class {label} does not exist; the classes are 0 to {classes - 1}")
    rows = (labels_N == label).nonzero().squeeze(1)
    if not len(rows):
        raise UserError(f"class {label} has no training images")
    return rows


class PoisonedSetInfo(Settings):
    """Metadata in the header of the file. `of`: see `PoisonedSet.rate_of`; `added`: offset to the project's seed."""

    attack: str
    rate: float
    of: str
    available: int
    goal: Goal
    added: Seed
    trial: int


def save(
    path: Path,
    poisoned: PoisonedSet,
    about: PoisonedSetInfo,
    *,
    params: Mapping[str, Any],
    dataset: str,
    seed: int,
    seconds: float,
) -> str:
    """Writes the set as an artifact and returns its content hash."""
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


def _tensors(poisoned: PoisonedSet) -> dict[str, Tensor]:
    trigger = poisoned.trigger
    optional = {
        "opacity": trigger.opacity if trigger else None,
        "pattern": trigger.pattern if trigger else None,
        "wanted_image": poisoned.target_image,
    }
    tensors = {name: getattr(poisoned, name) for name in FIELDS} | optional
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def load(path: Path) -> PoisonedSet:
    """Reads a poisoned set. Raises UserError if the file is missing, damaged, or not a poisoned set."""
    artifact = artifacts.load(path, KIND)
    about = validate(artifact.header.about, PoisonedSetInfo, f"{path}: header")
    tensors = artifact.tensors
    needed = (*FIELDS, *(TRIGGER if set(TRIGGER) & set(tensors) else ()))
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{path}: has no tensor '{missing[0]}'; build it again")
    if not _is_consistent(tensors):
        raise UserError(f"{path}: its tensors do not belong together; build it again")
    return _from_tensors(tensors, about.of, about.available, about.goal)


def _from_tensors(tensors: Mapping[str, Tensor], rate_of: str, available: int, goal: Goal) -> PoisonedSet:
    return PoisonedSet(
        **{name: tensors[name] for name in FIELDS},
        rate_of=rate_of,
        available=available,
        goal=goal,
        trigger=Trigger(tensors["opacity"], tensors["pattern"]) if "opacity" in tensors else None,
        target_image=tensors.get("wanted_image"),
    )


def to_checkpoint(poisoned: PoisonedSet) -> Checkpoint:
    """Returns the set as a checkpoint."""
    values = {"of": poisoned.rate_of, "available": poisoned.available, "goal": poisoned.goal.model_dump()}
    return Checkpoint(_tensors(poisoned), values)


def from_checkpoint(checkpoint: Checkpoint) -> PoisonedSet:
    """Returns the set of `to_checkpoint`. Raises ValueError or KeyError for any other checkpoint."""
    values = checkpoint.values
    if not _is_consistent(checkpoint.tensors):
        raise ValueError("its tensors do not belong together")
    return _from_tensors(checkpoint.tensors, values["of"], values["available"], Goal(**values["goal"]))


def _is_consistent(tensors: Mapping[str, Tensor]) -> bool:
    """Whether types, shapes and values are those that `save` writes."""
    images, labels, rows, true_labels = (tensors[name] for name in FIELDS)
    image = images.shape[1:]
    images_CHW = [tensors[name] for name in ("pattern", "wanted_image") if name in tensors]
    return (
        images.dtype == torch.uint8
        and images.ndim == 4
        and all(each.dtype == torch.int64 and each.ndim == 1 for each in (labels, rows, true_labels))
        and len(labels) == len(images)
        and len(rows) == len(true_labels)
        and bool(((rows >= 0) & (rows < len(images))).all())
        and bool((rows.diff() > 0).all())
        and all(each.dtype == torch.uint8 and each.shape == image for each in images_CHW)
        and ("opacity" not in tensors or _is_opacity(tensors["opacity"], image))
    )


def _is_opacity(opacity: Tensor, image: torch.Size) -> bool:
    return opacity.dtype == torch.float32 and opacity.shape == image and bool(((opacity >= 0) & (opacity <= 1)).all())

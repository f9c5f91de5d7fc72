"""The prepared data set: fixed splits of uint8 tensors, with image shape, class names and channel statistics.

Shapes: N images, C channel, H/W pixels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.core.settings import NonNegativeInt, PositiveFloat, PositiveInt, Settings, validate
from advmoe.data.images import LabelledImages, SourceImages
from advmoe.runtime.machine import derive_seed

SplitName = Literal["train", "pool", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
KIND = "dataset"
Side = Annotated[int, Field(gt=0, le=2**14, strict=True)]  # pixels; bounds the memory that a file header can request


class Splits(Settings):
    """Number of images of each split, drawn stratified by class; the training split gets the rest.

    `test`: images of the source's official test split if it has one (null: all of them).
    """

    pool: NonNegativeInt
    validation: PositiveInt
    test: PositiveInt | None


class DatasetInfo(Settings):
    """Properties of a data set: image shape, class names, and channel statistics of the training split."""

    channels: Literal[1, 3]
    height: Side
    width: Side
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _each_channel_has_statistics(self) -> "DatasetInfo":
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError("mean and std must hold one number for each channel")
        return self

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8, labels (N,) int64, and each image's position in its source (N,) int64."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        """Returns the images as float32 in [0, 1]."""
        return self.images.float() / 255

    def first(self, count: int | None) -> "Split":
        """Returns the first `count` images; all of them for None."""
        return Split(self.images[:count], self.labels[:count], self.index[:count])


@dataclass(frozen=True)
class Dataset:
    """The splits by name, the properties, and the content hash of the artifact."""

    splits: Mapping[SplitName, Split]
    facts: DatasetInfo
    sha256: str

    def __getitem__(self, name: SplitName) -> Split:
        return self.splits[name]


def stratified_split(labels: np.ndarray, counts: Mapping[SplitName, int], seed: int) -> dict[SplitName, np.ndarray]:
    """Returns disjoint positions for each named count, drawn stratified by class; the rest is 'train'.

    Each split is shuffled. The count of a class deviates from its share by about one image at most.
    Raises UserError if the counts leave no training image.
    """
    check_training_images_remain(sum(counts.values()), len(labels))
    draw = np.random.default_rng(seed)
    # shuffle, then order each image by its rank within its class: any run of this order is stratified
    shuffled = draw.permutation(len(labels))
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        quantile[members] = (np.arange(len(members)) + draw.random()) / len(members)
    order = np.argsort(quantile, kind="stable")
    split: dict[SplitName, np.ndarray] = {}
    start = 0
    for name, count in counts.items():
        split[name] = draw.permutation(order[start : start + count])
        start += count
    split["train"] = draw.permutation(order[start:])
    return split


def check_training_images_remain(requested: int, available: int) -> None:
    """Raises UserError if the other splits take all images, or more."""
    if requested >= available:
        raise UserError(
            f"prepare.splits: {requested} images requested, but there are {available} and training needs some"
        )


def draw_splits(source: SourceImages, splits: Splits, seed: int) -> dict[SplitName, tuple[LabelledImages, np.ndarray]]:
    """Returns the splits by name: images, and their positions in the source (or in its official test split).

    Raises UserError if the source has too few images for `splits`.
    """
    counts: dict[SplitName, int] = {"pool": splits.pool, "validation": splits.validation}
    if source.test is None:
        if splits.test is None:
            raise UserError("prepare.splits.test: this source has no official test split, so a number is required")
        counts["test"] = splits.test
    positions = stratified_split(source.train.labels, counts, derive_seed(seed, "splits"))
    assigned = np.concatenate(list(positions.values()))
    assert len(np.unique(assigned)) == len(assigned) == len(source.train.labels), "splits overlap or lose images"
    drawn = {name: (_take(source.train, rows), rows) for name, rows in positions.items()}
    if source.test is not None:
        rows = _draw_test(source.test, splits.test, derive_seed(seed, "test"))
        drawn["test"] = (_take(source.test, rows), rows)
    return drawn


def _draw_test(test: LabelledImages, count: int | None, seed: int) -> np.ndarray:
    if count is None or count == len(test.labels):
        return np.random.default_rng(seed).permutation(len(test.labels))
    if count > len(test.labels):
        raise UserError(f"prepare.splits.test: {count} images requested, the test split has {len(test.labels)}")
    return stratified_split(test.labels, {"test": count}, seed)["test"]


def _take(part: LabelledImages, rows: np.ndarray) -> LabelledImages:
    return LabelledImages(part.images[rows], part.labels[rows])


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel of uint8 images (N, C, H, W), scaled to [0, 1].

    Raises UserError if a channel is constant.
    """
    levels = np.arange(256) / 255
    # from histograms: exact, and little memory for any number of images
    shares = np.stack([np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(images.shape[1])])
    shares = shares / shares.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    if not (std > 1e-6).all():
        raise UserError("prepare.source: a channel of the training images is constant")
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())


def count_train_test_duplicates(drawn: Mapping[SplitName, tuple[LabelledImages, np.ndarray]]) -> int:
    """Returns how many test images have an identical image in the training split (duplicates in the source)."""
    train_digests = set(image_digests(torch.from_numpy(drawn["train"][0].images)))
    return sum(digest in train_digests for digest in image_digests(torch.from_numpy(drawn["test"][0].images)))


def image_digests(images_NCHW: Tensor) -> list[str]:
    """Returns the SHA-256 of every image's bytes, as hex."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images_NCHW]


def save(
    path: Path,
    drawn: Mapping[SplitName, tuple[LabelledImages, np.ndarray]],
    facts: DatasetInfo,
    *,
    params: Mapping[str, Any],
    seed: int,
    metrics: Mapping[str, int],
    seconds: float,
) -> str:
    """Writes the splits as one artifact; returns its content hash."""
    tensors: dict[str, Tensor] = {}
    for name, (part, rows) in drawn.items():
        tensors[f"{name}.images"] = torch.from_numpy(part.images)
        tensors[f"{name}.labels"] = torch.from_numpy(part.labels)
        tensors[f"{name}.index"] = torch.from_numpy(rows.astype(np.int64))
    about = facts.model_dump(mode="json")
    written = artifacts.save(
        path, KIND, tensors, about=about, params=params, inputs={}, seed=seed, metrics=metrics, seconds=seconds
    )
    return written.sha256


def load(path: Path) -> Dataset:
    """Loads a prepared data set. Raises UserError if the file is missing, damaged or not a data set."""
    artifact = artifacts.load(path, KIND)
    facts = validate(artifact.header.about, DatasetInfo, f"{path}: header")
    try:
        splits = {
            name: Split(*(artifact.tensors[f"{name}.{part}"] for part in ("images", "labels", "index")))
            for name in SPLITS
        }
    except KeyError as error:
        raise UserError(f"{path}: has no tensor {error}; build it again") from error
    for name, split in splits.items():
        if not _matches_header(split, facts):
            raise UserError(f"{path}: the tensors of split '{name}' do not match the header; build it again")
    return Dataset(splits, facts, artifact.header.sha256)


def _matches_header(split: Split, facts: DatasetInfo) -> bool:
    rows = split.labels.shape
    int64 = all(part.dtype == torch.int64 for part in (split.labels, split.index))
    return (
        int64
        and len(rows) == 1
        and split.index.shape == rows
        and split.images.dtype == torch.uint8
        and split.images.shape == (*rows, facts.channels, facts.height, facts.width)
        and bool(((split.labels >= 0) & (split.labels < facts.classes)).all())
    )

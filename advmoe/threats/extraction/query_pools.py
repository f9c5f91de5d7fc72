"""Pools of query images: photographs, another data set, uniform noise, or the attacker's own split.

No pool may hold an image of the victim's training, validation or test split.

Shapes: N images, C channel, H/W pixels.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings
from advmoe.data.dataset import Dataset, DatasetInfo, Split, SplitName, image_digests
from advmoe.data.images import check_source
from advmoe.data.registry import Source

VICTIM_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
SCALES = (1, 2, 4)  # crop size as a multiple of the victim's image size, downscaled afterwards


class Photographs(Settings):
    """Random crops of the two sample photographs of scikit-learn, in the victim's image size; no download."""

    kind: Literal["photographs"]
    images: PositiveInt


class OtherDataset(Settings):
    """The training images of another `source` (as in `prepare.source`); they must have the victim's image size."""

    kind: Literal["dataset"]
    source: Source


class UniformNoise(Settings):
    """Images of uniform noise."""

    kind: Literal["noise"]
    images: PositiveInt


class InDistribution(Settings):
    """The split `pool`, which `prepare` sets aside for the attacker."""

    kind: Literal["in-distribution"]


AnyPool = Photographs | OtherDataset | UniformNoise | InDistribution
Pool = Annotated[AnyPool, Field(discriminator="kind")]


@dataclass(frozen=True)
class Candidates:
    """Candidate query images (N, C, H, W) uint8, shuffled, and the index of each image's group (N,), e.g. its class."""

    images: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load_pool(pool: AnyPool, data: Dataset, stream: torch.Generator) -> Candidates:
    """Returns the pool's images, drawn and shuffled by `stream`.

    Raises UserError when the pool is empty, its image shape does not match, or it overlaps with the victim's splits.
    """
    match pool:
        case Photographs():
            images, groups = _photographs(pool.images, data.facts, stream)
        case OtherDataset():
            images, groups = _other_dataset(pool.source, data.facts)
        case UniformNoise():
            images = uniform_noise(pool.images, data.facts, stream)
            groups = torch.zeros(pool.images, dtype=torch.int64)
        case InDistribution():
            own = in_distribution(data)
            images, groups = own.images, own.labels
    check_disjoint(images, data)
    order = torch.randperm(len(images), generator=stream)
    return Candidates(images[order], groups[order])


def uniform_noise(count: int, facts: DatasetInfo, stream: torch.Generator) -> Tensor:
    """Returns uniform noise (count, C, H, W) uint8."""
    shape = (count, facts.channels, facts.height, facts.width)
    return torch.randint(0, PIXEL_LEVELS + 1, shape, generator=stream, dtype=torch.uint8)


def in_distribution(data: Dataset) -> Split:
    """Returns the split `pool` with true labels, without duplicates of images in the victim's splits.

    Raises UserError when no image is left.
    """
    pool = data["pool"]
    victim_rows = {*data["train"].index.tolist(), *data["validation"].index.tolist()}
    assert not victim_rows & set(pool.index.tolist()), "prepare draws disjoint splits"
    known = {digest for name in VICTIM_SPLITS for digest in image_digests(data[name].images)}
    keep = torch.tensor([digest not in known for digest in image_digests(pool.images)], dtype=torch.bool)
    if not keep.any():
        raise UserError("the attacker's pool holds no images; prepare.splits.pool sets some aside")
    return Split(pool.images[keep], pool.labels[keep], pool.index[keep])


def check_disjoint(images_NCHW: Tensor, data: Dataset) -> None:
    """Raises UserError when an image is byte-identical to one of the victim's splits."""
    pool = set(image_digests(images_NCHW))
    for name in VICTIM_SPLITS:
        shared = pool & set(image_digests(data[name].images))
        if shared:
            raise UserError(f"the attacker's pool and the victim's {name} split share {len(shared)} images")


def _photographs(count: int, facts: DatasetInfo, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns crops and their groups: the combination of photograph and scale."""
    photographs = [torch.from_numpy(np.moveaxis(each, -1, 0).copy()) for each in load_sample_images().images]
    which = torch.randint(len(photographs), (count,), generator=stream)
    scale = torch.randint(len(SCALES), (count,), generator=stream)
    crops = [
        _crop(photographs[photograph], SCALES[size], facts, stream)
        for photograph, size in zip(which.tolist(), scale.tolist(), strict=True)
    ]
    return torch.stack(crops), which * len(SCALES) + scale


def _crop(photograph: Tensor, scale: int, facts: DatasetInfo, stream: torch.Generator) -> Tensor:
    height, width = facts.height * scale, facts.width * scale
    if height > photograph.shape[1] or width > photograph.shape[2]:
        raise UserError(f"the photographs are too small for crops of {height} x {width} pixels; use another pool")
    top, left = (
        int(torch.randint(whole - part + 1, (), generator=stream))
        for whole, part in ((photograph.shape[1], height), (photograph.shape[2], width))
    )
    small = functional.avg_pool2d(photograph[:, top : top + height, left : left + width].float(), scale)
    if facts.channels == 1:
        small = (small * torch.tensor(LUMA_WEIGHTS)[:, None, None]).sum(dim=0, keepdim=True)
    return small.round().to(torch.uint8)


def _other_dataset(source: Source, facts: DatasetInfo) -> tuple[Tensor, Tensor]:
    source_images = check_source(source.read(), f"pool ({source.kind})").train
    expected = (facts.channels, facts.height, facts.width)
    if source_images.images.shape[1:] != expected:
        raise UserError(
            f"pool ({source.kind}): images are {source_images.images.shape[1:]}, but the victim takes {expected}"
        )
    return torch.from_numpy(source_images.images), torch.from_numpy(source_images.labels)

"""Where an attacker's images come from: none may be one that the victim was trained or is tested on.

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
from advmoe.data.dataset import Dataset, Facts, Split, SplitName, digests
from advmoe.data.images import check
from advmoe.data.registry import Source

VICTIMS_OWN: tuple[SplitName, ...] = ("train", "validation", "test")
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness, ITU-R BT.601
SCALES = (1, 2, 4)  # crops of so many times the victim's size, shrunk: near and far views of the same photograph


class Photographs(Settings):
    """Random crops of the two photographs that scikit-learn brings along, in the victim's size: no download."""

    kind: Literal["photographs"]
    images: PositiveInt


class OtherDataset(Settings):
    """The training images of another source, as `prepare.source` names them (a file too), in the victim's size."""

    kind: Literal["dataset"]
    source: Source


class UniformNoise(Settings):
    """Every pixel drawn uniformly."""

    kind: Literal["noise"]
    images: PositiveInt


class InDistribution(Settings):
    """The split that preparation sets aside for the attacker."""

    kind: Literal["in-distribution"]


AnyPool = Photographs | OtherDataset | UniformNoise | InDistribution
Pool = Annotated[AnyPool, Field(discriminator="kind")]


@dataclass(frozen=True)
class Candidates:
    """Images (N, C, H, W) uint8 to ask about, shuffled, and which of them are alike (N,): the group's number."""

    images: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.images)


def gather(pool: AnyPool, data: Dataset, stream: torch.Generator) -> Candidates:
    """The pool's images, drawn and shuffled by `stream`. Raises UserError when there are none, they do not fit, or
    some of them are the victim's.
    """
    match pool:
        case Photographs():
            images, groups = _photographs(pool.images, data.facts, stream)
        case OtherDataset():
            images, groups = _other(pool.source, data.facts)
        case UniformNoise():
            images = uniform_noise(pool.images, data.facts, stream)
            groups = torch.zeros(pool.images, dtype=torch.int64)
        case InDistribution():
            own = in_distribution(data)
            images, groups = own.images, own.labels
    refuse_overlap(images, data)
    order = torch.randperm(len(images), generator=stream)
    return Candidates(images[order], groups[order])


def uniform_noise(count: int, facts: Facts, stream: torch.Generator) -> Tensor:
    """Images of uniform noise (count, C, H, W) uint8."""
    shape = (count, facts.channels, facts.height, facts.width)
    return torch.randint(0, PIXEL_LEVELS + 1, shape, generator=stream, dtype=torch.uint8)


def in_distribution(data: Dataset) -> Split:
    """The attacker's own images with their true labels, without those that the source holds twice and that are
    therefore the victim's as well. Raises UserError when none are left.
    """
    pool = data["pool"]
    drawn_beside = {*data["train"].index.tolist(), *data["validation"].index.tolist()}
    assert not drawn_beside & set(pool.index.tolist()), "preparation draws its splits disjoint"
    known = {digest for name in VICTIMS_OWN for digest in digests(data[name].images)}
    keep = torch.tensor([digest not in known for digest in digests(pool.images)], dtype=torch.bool)
    if not keep.any():
        raise UserError("the attacker's pool holds no images; prepare.splits.pool sets some aside")
    return Split(pool.images[keep], pool.labels[keep], pool.index[keep])


def refuse_overlap(images_NCHW: Tensor, data: Dataset) -> None:
    """Raises UserError when one of the images is, byte for byte, one that the victim was trained or is tested on."""
    theirs = set(digests(images_NCHW))
    for name in VICTIMS_OWN:
        shared = theirs & set(digests(data[name].images))
        if shared:
            raise UserError(f"the attacker's pool and the victim's {name} split share {len(shared)} images")


def _photographs(count: int, facts: Facts, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops, and of which photograph at which scale each is."""
    photographs = [torch.from_numpy(np.moveaxis(each, -1, 0).copy()) for each in load_sample_images().images]
    which = torch.randint(len(photographs), (count,), generator=stream)
    scale = torch.randint(len(SCALES), (count,), generator=stream)
    crops = [
        _crop(photographs[photograph], SCALES[size], facts, stream)
        for photograph, size in zip(which.tolist(), scale.tolist(), strict=True)
    ]
    return torch.stack(crops), which * len(SCALES) + scale


def _crop(photograph: Tensor, scale: int, facts: Facts, stream: torch.Generator) -> Tensor:
    height, width = facts.height * scale, facts.width * scale
    if height > photograph.shape[1] or width > photograph.shape[2]:
        raise UserError(f"the photographs are too small for crops of {height} x {width} pixels; take another pool")
    top, left = (
        int(torch.randint(whole - part + 1, (), generator=stream))
        for whole, part in ((photograph.shape[1], height), (photograph.shape[2], width))
    )
    small = functional.avg_pool2d(photograph[:, top : top + height, left : left + width].float(), scale)
    if facts.channels == 1:
        small = (small * torch.tensor(GREY)[:, None, None]).sum(dim=0, keepdim=True)
    return small.round().to(torch.uint8)


def _other(source: Source, facts: Facts) -> tuple[Tensor, Tensor]:
    found = check(source.read(), f"pool ({source.kind})").train
    wanted = (facts.channels, facts.height, facts.width)
    if found.images.shape[1:] != wanted:
        raise UserError(f"pool ({source.kind}): images are {found.images.shape[1:]}, but the victim takes {wanted}")
    return torch.from_numpy(found.images), torch.from_numpy(found.labels)

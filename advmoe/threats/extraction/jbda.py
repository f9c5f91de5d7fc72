"""Jacobian-based data augmentation (Papernot et al. 2017, arXiv 1602.02697): ask where the surrogate's answer changes.

Shapes: N images, C channel, H/W pixels.
"""

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from advmoe.attacks import engine
from advmoe.attacks.interface import Model, pixel_gradient
from advmoe.core.settings import PIXEL_LEVELS, NonNegativeInt, PositiveFloat, Settings
from advmoe.runtime.machine import device
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import InDistribution
from advmoe.threats.extraction.transfer_set import TransferSet, asked, joined

BATCH = 256


class Jbda(Settings):
    """`seeds` images of the in-distribution pool are asked first; then, `doublings` times, a surrogate learns what is
    known and every image is moved by `step` (share of the pixel range) along the sign of the surrogate's gradient.
    """

    kind: Literal["jbda"]
    seeds: Annotated[int, Field(ge=2, strict=True)]
    doublings: NonNegativeInt
    step: PositiveFloat


def jbda(settings: Jbda, tools: AttackContext) -> TransferSet:
    """At most seeds * 2^doublings images. Raises UserError when the budget is larger, or seeds are lacking."""
    oracle, own = tools.oracle, tools.gather(InDistribution(kind="in-distribution"))
    seeds = min(settings.seeds, oracle.left)
    most = settings.seeds * 2**settings.doublings
    tools.reach(most, f"{settings.seeds} seeds doubled {settings.doublings} times are {most}")
    if seeds > len(own):
        tools.reach(len(own), f"{settings.seeds} seeds are wanted, the attacker's pool holds {len(own)}")
    known = asked(oracle, own.images[:seeds])
    while oracle.left:
        with engine.attack_mode(tools.learn(known), "float32") as cheap:
            moved = augmented(cheap, known.images, known.answers.argmax(1), settings.step)
        known = joined(known, asked(oracle, moved[: oracle.left]))
    return known


def augmented(surrogate: Model, images_NCHW: Tensor, labels_N: Tensor, step: float) -> Tensor:
    """Every image moved by `step` along the sign of the gradient of its label's logit, in whole pixel levels."""
    moved = []
    for images, labels in zip(torch.split(images_NCHW, BATCH), torch.split(labels_N, BATCH), strict=True):
        pixels, wanted = images.to(device()).float() / PIXEL_LEVELS, labels.to(device())
        gradient, _ = pixel_gradient(surrogate, pixels, partial(_own_logit, labels_B=wanted))
        levels = (pixels + step * gradient.sign()).clamp(0, 1) * PIXEL_LEVELS
        moved.append(levels.round().to(torch.uint8).cpu())
    return torch.cat(moved)


def _own_logit(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    return logits_BK.gather(1, labels_B[:, None]).squeeze(1)

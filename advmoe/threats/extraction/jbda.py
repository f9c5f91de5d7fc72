"""JBDA, Jacobian-based data augmentation: queries images moved along the surrogate's gradient (Papernot et al. 2017,
arXiv 1602.02697).

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
from advmoe.threats.extraction.transfer_set import TransferSet, concatenate, query

BATCH_SIZE = 256


class Jbda(Settings):
    """Settings. Queries `seeds` images of the in-distribution pool; then, `doublings` times, trains a surrogate on all
    answers and moves every image by `step` (share of the pixel range) along the sign of the surrogate's gradient.
    """

    kind: Literal["jbda"]
    seeds: Annotated[int, Field(ge=2, strict=True)]
    doublings: NonNegativeInt
    step: PositiveFloat


def jbda(settings: Jbda, context: AttackContext) -> TransferSet:
    """Queries at most seeds * 2^doublings images. Raises UserError when the budget is larger or the pool too small."""
    oracle, own = context.oracle, context.load_pool(InDistribution(kind="in-distribution"))
    seeds = min(settings.seeds, oracle.remaining)
    limit = settings.seeds * 2**settings.doublings
    context.require_budget_at_most(limit, f"{settings.seeds} seeds doubled {settings.doublings} times are {limit}")
    if seeds > len(own):
        reason = f"{settings.seeds} seeds are required, but the attacker's pool holds {len(own)}"
        context.require_budget_at_most(len(own), reason)
    transfer_set = query(oracle, own.images[:seeds])
    while oracle.remaining:
        with engine.attack_mode(context.train_surrogate(transfer_set), "float32") as frozen:
            moved = augmented(frozen, transfer_set.images, transfer_set.answers.argmax(1), settings.step)
        transfer_set = concatenate(transfer_set, query(oracle, moved[: oracle.remaining]))
    return transfer_set


def augmented(surrogate: Model, images_NCHW: Tensor, labels_N: Tensor, step: float) -> Tensor:
    """Returns the images (N, C, H, W) uint8, moved by `step` along the sign of the gradient of the label's logit."""
    moved = []
    for images, labels in zip(torch.split(images_NCHW, BATCH_SIZE), torch.split(labels_N, BATCH_SIZE), strict=True):
        pixels, labels_B = images.to(device()).float() / PIXEL_LEVELS, labels.to(device())
        gradient, _ = pixel_gradient(surrogate, pixels, partial(_label_logit, labels_B=labels_B))
        levels = (pixels + step * gradient.sign()).clamp(0, 1) * PIXEL_LEVELS
        moved.append(levels.round().to(torch.uint8).cpu())
    return torch.cat(moved)


def _label_logit(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    return logits_BK.gather(1, labels_B[:, None]).squeeze(1)

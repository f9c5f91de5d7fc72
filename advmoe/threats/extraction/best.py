"""BEST: extraction of robust models by queries on which the surrogate is least certain (Li et al. 2022, "Extracting
Robust Models with Uncertain Examples", ICLR 2023).

Shapes: N images, C channel, H/W pixels, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, round_to_uint8
from advmoe.attacks.interface import Model, pixel_gradient
from advmoe.core.settings import PIXEL_LEVELS, Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.runtime.machine import device
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import InDistribution
from advmoe.threats.extraction.transfer_set import TransferSet, concatenate, query

BATCH_SIZE = 256


class Best(Settings):
    """Settings. Each of `rounds` queries an equal share of the budget: images of the in-distribution pool, cyclically,
    moved within `epsilon` by `steps` of `step_size` (relative to epsilon) towards a uniform surrogate output.
    """

    kind: Literal["best"]
    rounds: PositiveInt
    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat


def best(settings: Best, context: AttackContext) -> TransferSet:
    """Queries uncertain examples in rounds; the first round queries unmodified images.

    Raises UserError when the pool or the budget is too small.
    """
    oracle, own = context.oracle, context.load_pool(InDistribution(kind="in-distribution"))
    context.require_two_queries_per_round(settings.rounds)
    share = -(-oracle.budget // settings.rounds)
    if share > len(own):
        limit = settings.rounds * len(own)
        context.require_budget_at_most(limit, f"{settings.rounds} rounds over {len(own)} images are {limit}")
    transfer_set = query(oracle, own.images[:share])
    for round_number in range(1, settings.rounds):
        start = own.images.roll(-round_number * share, dims=0)[: min(share, oracle.remaining)]
        if not len(start):
            break
        with engine.attack_mode(context.train_surrogate(transfer_set), "float32") as frozen:
            uncertain = most_uncertain(frozen, start, settings)
        transfer_set = concatenate(transfer_set, query(oracle, uncertain))
    return transfer_set


def most_uncertain(surrogate: Model, images_NCHW: Tensor, settings: Best) -> Tensor:
    """Returns images (N, C, H, W) uint8, moved towards a uniform distribution of the surrogate (eq. 2)."""
    ball, moved = LInf(settings.epsilon), []
    for images in torch.split(images_NCHW, BATCH_SIZE):
        pixels = images.to(device()).float() / PIXEL_LEVELS
        points = pixels
        for _ in range(settings.steps):
            gradient, _ = pixel_gradient(surrogate, points, _uniformity)
            points = ball.project(points + settings.step_size * ball.epsilon * ball.steepest(gradient), pixels)
        moved.append(round_to_uint8(points.cpu(), images, ball.epsilon))
    return torch.cat(moved)


def _uniformity(logits_BK: Tensor) -> Tensor:
    """Returns -KL(uniform || softmax) up to a constant: the mean log-probability over classes (B,)."""
    return functional.log_softmax(logits_BK, dim=1).mean(dim=1)

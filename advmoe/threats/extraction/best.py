"""BEST: stealing robustness too, by asking about the inputs on which the surrogate is least certain (Li et al. 2022,
"Extracting Robust Models with Uncertain Examples", ICLR 2023).

Shapes: N images, C channel, H/W pixels, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, to_levels
from advmoe.attacks.interface import Model, pixel_gradient
from advmoe.core.settings import PIXEL_LEVELS, Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.runtime.machine import device
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.query_pools import InDistribution
from advmoe.threats.extraction.transfer_set import TransferSet, asked, joined

BATCH = 256


class Best(Settings):
    """In each of `rounds` a share of the budget is asked: images of the in-distribution pool, again and again, moved
    within `epsilon` by `steps` of `step_size` (relative to epsilon) to where the surrogate's answer is most even.
    """

    kind: Literal["best"]
    rounds: PositiveInt
    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat


def best(settings: Best, tools: AttackContext) -> TransferSet:
    """The first round asks about images as they are. Raises UserError for a pool or budget too small for that."""
    oracle, own = tools.oracle, tools.gather(InDistribution(kind="in-distribution"))
    tools.two_a_round(settings.rounds)
    share = -(-oracle.budget // settings.rounds)
    if share > len(own):
        most = settings.rounds * len(own)
        tools.reach(most, f"{settings.rounds} rounds over {len(own)} images are {most}")
    known = asked(oracle, own.images[:share])
    for number in range(1, settings.rounds):
        start = own.images.roll(-number * share, dims=0)[: min(share, oracle.left)]
        if not len(start):
            break
        with engine.attack_mode(tools.learn(known), "float32") as cheap:
            uncertain = most_uncertain(cheap, start, settings)
        known = joined(known, asked(oracle, uncertain))
    return known


def most_uncertain(surrogate: Model, images_NCHW: Tensor, settings: Best) -> Tensor:
    """Images moved, in whole pixel levels, to where the surrogate's distribution is closest to uniform (eq. 2)."""
    ball, moved = LInf(settings.epsilon), []
    for images in torch.split(images_NCHW, BATCH):
        pixels = images.to(device()).float() / PIXEL_LEVELS
        points = pixels
        for _ in range(settings.steps):
            gradient, _ = pixel_gradient(surrogate, points, _evenness)
            points = ball.project(points + settings.step_size * ball.epsilon * ball.steepest(gradient), pixels)
        moved.append(to_levels(points.cpu(), images, ball.epsilon))
    return torch.cat(moved)


def _evenness(logits_BK: Tensor) -> Tensor:
    """Minus KL(uniform || answer), up to a constant: the mean log-probability of all classes (B,)."""
    return functional.log_softmax(logits_BK, dim=1).mean(dim=1)

"""RayS: finds the nearest decision boundary along sign vectors, from labels alone (Chen & Gu 2020, arXiv 2006.12792).

A direction is better than the best one if the model is wrong at the best radius along it (one query, the fast check of
algorithm 2); only then bisection finds its own radius. New directions flip the signs of a block of pixels, and blocks
are halved from sweep to sweep (algorithm 3). Three differences from the paper: (1) A better direction is queried at
epsilon next, which ends the attack or shortens the bisection. (2) The searches of a batch are independent: in every
step each active image makes the one query that its own search needs. (3) Until a ray of an image meets the boundary,
each flip is kept with probability 1/2; otherwise all flips would start from the same direction.

In L-inf the rays lead to the corners of the cube, where the optimum of a smooth model tends to be. In L2 the rays are
the same with their length measured in L2: the attack is weaker there, because the optimum rarely has equal magnitude in
all pixels, and because the length that the box cuts off is not redistributed.

Shapes: B batch, b images still under attack, C channel, H/W pixels, D pixels of an image in one row, K classes.
"""

from collections.abc import Iterator
from itertools import chain, cycle, islice, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import IsAdversarial, Model, confirm_adversarial
from advmoe.core.settings import PositiveInt, Settings

CHECK, AT_EPSILON, BISECT = range(
    3
)  # purpose of the next query: better than the best? adversarial at epsilon? bisect the radius
TOLERANCE = 1e-3  # of epsilon; the authors' 1e-3 in L2 length is 6e-4 of epsilon at CIFAR-10 and 8/255


class RayS(Settings):
    """`queries`: query budget per image; 10000 in the paper."""

    kind: Literal["rays"]
    queries: PositiveInt


class SearchState(NamedTuple):
    """State of the search of each image under attack."""

    signs_bCHW: Tensor  # the best direction
    radius_b: Tensor  # its distance to the boundary in the ball's norm; infinite until one is found
    low_b: Tensor  # bracket of the candidate direction: not misclassified (or not queried) here ...
    high_b: Tensor  # ... and misclassified here, after CHECK
    phase_b: Tensor  # CHECK, NEAR or BISECT
    block_b: Tensor  # index of the block whose signs are flipped in the candidate direction

    def pick(self, rows: Tensor) -> "SearchState":
        """Returns the state of the images `rows`."""
        return SearchState(*(part[rows] for part in self))


@torch.no_grad()
def rays(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: RayS,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the first adversarial point in the ball, else the point at epsilon on the best ray; inside [0, 1]."""
    images, labels = images_BCHW, labels_B
    active = torch.arange(len(images), device=images.device)
    search, result = initial_state(images), images.clone()
    coins = draws.uniform(images.new_empty(len(images), settings.queries)) < 0
    blocks = torch.tensor(list(islice(sign_blocks(images[0].numel()), settings.queries)), device=images.device)
    for _ in range(settings.queries):
        if not len(active):
            break
        candidates = flip_block(search, blocks)
        radius_queried = next_radius(search, ball)
        points = ray_points(images, candidates, radius_queried, ball)
        wrong = model(points).argmax(dim=1) != labels
        adversarial = confirm_adversarial(wrong & (radius_queried <= ball.epsilon), points, labels, is_adversarial)
        search = update_state(
            search, candidates, radius_queried, wrong, coins[active, search.block_b], TOLERANCE * ball.epsilon
        )
        if adversarial.any():
            result[active[adversarial]] = points[adversarial]
            search, images, labels, active = (
                search.pick(~adversarial),
                images[~adversarial],
                labels[~adversarial],
                active[~adversarial],
            )
    result[active] = ray_points(images, search.signs_bCHW, torch.full_like(search.radius_b, ball.epsilon), ball)
    return result


def initial_state(images_BCHW: Tensor) -> SearchState:
    """Returns the initial state: direction +1 in every pixel, no boundary found."""
    radius = images_BCHW.new_full((len(images_BCHW),), torch.inf)
    counter = torch.zeros(len(images_BCHW), dtype=torch.long, device=images_BCHW.device)
    return SearchState(torch.ones_like(images_BCHW), radius, torch.zeros_like(radius), radius, counter, counter)


def sign_blocks(pixels: int) -> Iterator[tuple[int, int]]:
    """Yields first and last + 1 pixel of each block: none, all, halves, ..., single pixels repeatedly."""
    levels = range((pixels - 1).bit_length() + 1)
    cuts = ([pixels * cut // 2**level for cut in range(2**level + 1)] for level in levels)
    finer = [[block for block in pairwise(level) if block[0] < block[1]] for level in cuts]
    return chain([(0, 0)], *finer, cycle(finer[-1]))


def flip_block(search: SearchState, blocks: Tensor) -> Tensor:
    """Returns the candidate directions: the best ones with one block of signs flipped, (b, C, H, W)."""
    signs_bD = search.signs_bCHW.flatten(1)
    start, stop = blocks[search.block_b].unsqueeze(2).unbind(1)
    pixels = torch.arange(signs_bD.shape[1], device=signs_bD.device)
    return torch.where((pixels >= start) & (pixels < stop), -signs_bD, signs_bD).view_as(search.signs_bCHW)


def next_radius(search: SearchState, ball: Ball) -> Tensor:
    """Returns the radius of the next query along the candidate direction, (b,)."""
    # a change of 1 in every pixel leaves the box everywhere
    longest = float(1 / ball.steepest(torch.ones_like(search.signs_bCHW[:1])).amax())
    middle = (search.low_b + search.high_b) / 2
    further = torch.where(search.phase_b == AT_EPSILON, torch.full_like(middle, ball.epsilon), middle)
    return torch.where(search.phase_b == CHECK, search.radius_b.clamp_max(longest), further)


def ray_points(images: Tensor, signs: Tensor, radius_b: Tensor, ball: Ball) -> Tensor:
    """Returns the points at `radius_b` along the rays, in the box; in the ball, too, up to a radius of epsilon."""
    radius = radius_b[:, None, None, None]
    points = (images + radius * ball.steepest(signs)).clamp(0, 1)
    return torch.where(radius <= ball.epsilon, ball.project(points, images), points)


def update_state(
    search: SearchState, candidates: Tensor, radius_queried: Tensor, wrong: Tensor, coin: Tensor, tolerance: float
) -> SearchState:
    """Returns the state after the queries: narrows brackets, accepts or rejects settled directions, advances blocks."""
    signs, radius, low, high, phase, block = search
    # a misclassified point inside epsilon was rejected by `is_adversarial`; the boundary still lies below it
    low = torch.where(~wrong & (radius_queried < high), radius_queried, low)
    high = torch.where(wrong, torch.minimum(high, radius_queried), high)
    settled = torch.where(phase == CHECK, ~wrong, high - low <= tolerance)
    accepted = settled & ((high < radius) | (radius.isinf() & coin))
    radius = torch.where(settled, torch.minimum(high, radius), radius)
    return SearchState(
        torch.where(accepted[:, None, None, None], candidates, signs),
        radius,
        torch.where(settled, 0, low),
        torch.where(settled, radius, high),
        torch.where(settled, CHECK, (phase + 1).clamp_max(BISECT)),
        block + settled.long(),
    )

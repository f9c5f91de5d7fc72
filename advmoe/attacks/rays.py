"""RayS: the nearest decision boundary along rays of signs, from decisions alone (Chen & Gu 2020, arXiv 2006.12792).

A direction is better than the best known if the model is wrong at the best known radius along it (one query, the fast
check of algorithm 2); only then its own radius is found, by bisection. New directions flip the signs of a block of
pixels, and blocks are halved from sweep to sweep (algorithm 3). Three things differ from the paper. There is an epsilon
to reach, so a better direction is asked at epsilon next, which ends the attack or cuts the bisection short. Images do
not wait for each other: in every step each open image makes the one query its own search needs. And as long as no ray
of an image has met the boundary, every second flip, by chance, is kept: flips of one fixed direction all look alike.

In L-inf the rays lead to the corners of the cube, where the optimum of a smooth model tends to be. In L2 they are the
same rays with their length measured in L2: the attack is weaker there, because the optimum rarely has equal sizes in
all pixels, and because what the box cuts off a ray is not spent elsewhere.

Shapes: B batch, b images still open, C channel, H/W pixels, D pixels of an image in one row, K classes.
"""

from collections.abc import Iterator
from itertools import chain, cycle, islice, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Model, confirmed
from advmoe.core.settings import PositiveInt, Settings

CHECK, NEAR, BISECT = range(3)  # what the next query asks: better than the best? inside epsilon? where exactly?
TOLERANCE = 1e-3  # of epsilon; the authors' 1e-3 in L2 length is 6e-4 of epsilon at CIFAR-10 and 8/255


class RayS(Settings):
    """`queries` is the budget of each image; the paper has 10000."""

    kind: Literal["rays"]
    queries: PositiveInt


class Search(NamedTuple):
    """Where the search of each open image stands."""

    signs_bCHW: Tensor  # the best direction known
    radius_b: Tensor  # how far it reaches to the boundary, in the ball's norm; infinite until one is met
    low_b: Tensor  # the tried direction's bracket: right (or never asked) here ...
    high_b: Tensor  # ... and wrong here, once the check is passed
    phase_b: Tensor  # CHECK, NEAR or BISECT
    block_b: Tensor  # number of the block whose signs are flipped in the tried direction

    def pick(self, rows: Tensor) -> "Search":
        """The search of some of the images."""
        return Search(*(part[rows] for part in self))


@torch.no_grad()
def rays(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: RayS,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """The first point inside the ball that fools the model, else the end of the best ray found; inside [0, 1]."""
    images, labels = images_BCHW, labels_B
    open_ = torch.arange(len(images), device=images.device)
    search, result = begin(images), images.clone()
    coins = draws.uniform(images.new_empty(len(images), settings.queries)) < 0
    blocks = torch.tensor(list(islice(sweeps(images[0].numel()), settings.queries)), device=images.device)
    for _ in range(settings.queries):
        if not len(open_):
            break
        tried = flipped(search, blocks)
        asked = next_radius(search, ball)
        points = along(images, tried, asked, ball)
        wrong = model(points).argmax(dim=1) != labels
        fallen = confirmed(wrong & (asked <= ball.epsilon), points, labels, fooled)
        search = advanced(search, tried, asked, wrong, coins[open_, search.block_b], TOLERANCE * ball.epsilon)
        if fallen.any():
            result[open_[fallen]] = points[fallen]
            search, images, labels, open_ = search.pick(~fallen), images[~fallen], labels[~fallen], open_[~fallen]
    result[open_] = along(images, search.signs_bCHW, torch.full_like(search.radius_b, ball.epsilon), ball)
    return result


def begin(images_BCHW: Tensor) -> Search:
    """Towards white, and nothing known."""
    radius = images_BCHW.new_full((len(images_BCHW),), torch.inf)
    counter = torch.zeros(len(images_BCHW), dtype=torch.long, device=images_BCHW.device)
    return Search(torch.ones_like(images_BCHW), radius, torch.zeros_like(radius), radius, counter, counter)


def sweeps(pixels: int) -> Iterator[tuple[int, int]]:
    """First pixel and the one after the last of each block: none, all, halves, ..., single ones over and over."""
    levels = range((pixels - 1).bit_length() + 1)
    cuts = ([pixels * cut // 2**level for cut in range(2**level + 1)] for level in levels)
    finer = [[block for block in pairwise(level) if block[0] < block[1]] for level in cuts]
    return chain([(0, 0)], *finer, cycle(finer[-1]))


def flipped(search: Search, blocks: Tensor) -> Tensor:
    """The directions being tried: the best known with one block of signs turned, (b, C, H, W)."""
    signs_bD = search.signs_bCHW.flatten(1)
    start, stop = blocks[search.block_b].unsqueeze(2).unbind(1)
    pixels = torch.arange(signs_bD.shape[1], device=signs_bD.device)
    return torch.where((pixels >= start) & (pixels < stop), -signs_bD, signs_bD).view_as(search.signs_bCHW)


def next_radius(search: Search, ball: Ball) -> Tensor:
    """How far along the tried direction the next query lies, (b,)."""
    # a step of 1 in every pixel leaves the box everywhere
    longest = float(1 / ball.steepest(torch.ones_like(search.signs_bCHW[:1])).amax())
    middle = (search.low_b + search.high_b) / 2
    further = torch.where(search.phase_b == NEAR, torch.full_like(middle, ball.epsilon), middle)
    return torch.where(search.phase_b == CHECK, search.radius_b.clamp_max(longest), further)


def along(images: Tensor, signs: Tensor, radius_b: Tensor, ball: Ball) -> Tensor:
    """The points at `radius_b` along the rays, inside the box; inside the ball, too, where the radius allows."""
    radius = radius_b[:, None, None, None]
    points = (images + radius * ball.steepest(signs)).clamp(0, 1)
    return torch.where(radius <= ball.epsilon, ball.project(points, images), points)


def advanced(search: Search, tried: Tensor, asked: Tensor, wrong: Tensor, coin: Tensor, tolerance: float) -> Search:
    """The search after the answers: the bracket narrowed, a settled direction judged, the next block taken up."""
    signs, radius, low, high, phase, block = search
    # what is wrong inside epsilon was denied: its boundary is still worth knowing, and lies below
    low = torch.where(~wrong & (asked < high), asked, low)
    high = torch.where(wrong, torch.minimum(high, asked), high)
    settled = torch.where(phase == CHECK, ~wrong, high - low <= tolerance)
    taken = settled & ((high < radius) | (radius.isinf() & coin))
    radius = torch.where(settled, torch.minimum(high, radius), radius)
    return Search(
        torch.where(taken[:, None, None, None], tried, signs),
        radius,
        torch.where(settled, 0, low),
        torch.where(settled, radius, high),
        torch.where(settled, CHECK, (phase + 1).clamp_max(BISECT)),
        block + settled.long(),
    )

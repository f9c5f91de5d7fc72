"""Square Attack: score-based random search over square windows (Andriushchenko et al. 2020, arXiv 1912.00049).

The loss is the margin and the schedule of window sizes is rescaled to the budget, as in AutoAttack (Croce & Hein 2020,
arXiv 2003.01690). As in the paper, and unlike AutoAttack's code, a window may touch every edge and each image has its
own windows.

Shapes: B batch, b images still under attack, C channel, H/W pixels, s side of a window, h/w rows and columns of tiles.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import TINY, Ball, RandomStream
from advmoe.attacks.black_box import BestPoints
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.core.settings import PositiveInt, Settings

# section 3.2: numbers of queries, of 10,000, after which the share of pixels in a window halves
SCHEDULE = 10_000
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
QUERIES_PER_DRAW = 100  # queries whose random numbers are drawn at once; 500 images need 1.6 MB
PLACEMENT_NUMBERS = 5  # random numbers per query besides one sign per channel: positions of two windows, an orientation


class Square(Settings):
    """`queries`: budget per image, including the initial point; `p_init`: share of pixels changed at first, in (0, 1].

    AutoAttack uses 5000 and 0.8; the paper 10000, and 0.05 in L-inf or 0.1 in L2.
    """

    kind: Literal["square"]
    queries: PositiveInt
    p_init: Annotated[float, Field(gt=0, le=1)]


@torch.no_grad()
def square(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Square,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the first adversarial point, else the one of highest margin; inside the ball and [0, 1]."""
    start, change = (start_stripes, change_window_linf) if ball.norm == "linf" else (start_tiles, change_window_l2)
    best = BestPoints(model, images_BCHW, labels_B, is_adversarial)
    best.query(start(images_BCHW, ball, draws))
    batch, channels, height, width = images_BCHW.shape
    for query in range(1, settings.queries):
        rows, column = best.active, (query - 1) % QUERIES_PER_DRAW
        if not len(rows):
            break
        if column == 0:
            numbers = images_BCHW.new_zeros(batch, QUERIES_PER_DRAW, channels + PLACEMENT_NUMBERS)
            numbers[rows] = draws.pick(rows).uniform(numbers[rows])
        side = window_side(query - 1, settings, height, width)
        best.query(change(best.points[rows], images_BCHW[rows], numbers[rows, column], side, ball))
    return best.points


def window_side(change: int, settings: Square, height: int, width: int) -> int:
    """Returns the side of the window in iteration `change`, counted from 0: large at first, one pixel at the end."""
    progress = int(change / settings.queries * SCHEDULE)
    share = settings.p_init / 2 ** sum(progress > limit for limit in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


@dataclass(frozen=True)
class Window:
    """A square in each image: offset of each row (b, H) and column (b, W) from the first one of the square."""

    rows_bH: Tensor
    columns_bW: Tensor
    side: int

    @classmethod
    def at(cls, numbers_b2: Tensor, side: int, images_bCHW: Tensor) -> "Window":
        """Returns windows at uniformly random positions, given two uniform numbers in [-1, 1] each."""
        height, width = images_bCHW.shape[2:]
        return cls(
            offsets_in_window(numbers_b2[:, 0], side, height), offsets_in_window(numbers_b2[:, 1], side, width), side
        )

    def mask(self) -> Tensor:
        """Returns which pixels lie inside, (b, 1, H, W) bool."""
        rows = (self.rows_bH >= 0) & (self.rows_bH < self.side)
        columns = (self.columns_bW >= 0) & (self.columns_bW < self.side)
        return rows[:, None, :, None] & columns[:, None, None, :]

    def stamp(self, pattern_ss: Tensor, upright_b: Tensor) -> Tensor:
        """Returns the pattern inside the window and 0 elsewhere, (b, 1, H, W); transposed where not `upright_b`."""
        rows = self.rows_bH.clamp(0, self.side - 1)[:, None, :, None]
        columns = self.columns_bW.clamp(0, self.side - 1)[:, None, None, :]
        placed = torch.where(upright_b[:, None, None, None], pattern_ss[rows, columns], pattern_ss[columns, rows])
        return placed * self.mask()


def offsets_in_window(numbers_b: Tensor, side: int, length: int) -> Tensor:
    """Returns the offset of each of `length` pixels from the first pixel of a random window of `side`; (b, length)."""
    positions = length - side + 1
    first_b = ((numbers_b + 1) / 2 * positions).long().clamp_max(positions - 1)
    return torch.arange(length, device=numbers_b.device) - first_b[:, None]


def random_signs(numbers: Tensor) -> Tensor:
    """Returns the signs of uniform random numbers: -1 or 1; never 0, unlike torch.sign."""
    return torch.where(numbers < 0, -1, 1).to(numbers)


# ---- L-inf: every pixel changes by plus or minus epsilon (section 3.3)


def start_stripes(images_BCHW: Tensor, ball: Ball, draws: RandomStream) -> Tensor:
    """Returns the initial points: vertical stripes one pixel wide, of random sign in each channel."""
    return ball.project(images_BCHW + ball.epsilon * random_signs(draws.uniform(images_BCHW[:, :, :1])), images_BCHW)


def change_window_linf(points_bCHW: Tensor, images_bCHW: Tensor, numbers: Tensor, side: int, ball: Ball) -> Tensor:
    """Moves a window to the boundary of the ball, up or down in each channel; 2 epsilon always suffice."""
    channels = points_bCHW.shape[1]
    push = 2 * ball.epsilon * random_signs(numbers[:, :channels])[:, :, None, None]
    inside = Window.at(numbers[:, channels:], side, points_bCHW).mask()
    return ball.project(points_bCHW + push * inside, images_bCHW)


# ---- L2: norm epsilon throughout, moved from window to window (section 3.4)


def start_tiles(images_BCHW: Tensor, ball: Ball, draws: RandomStream) -> Tensor:
    """Returns the initial points: 5 x 5 pyramids (more if not square) of random sign, in both orientations."""
    batch, channels, height, width = images_BCHW.shape
    side = max(min(height, width) // 5, 1)
    grid = (height // side, width // side)
    numbers = draws.uniform(images_BCHW.new_empty(batch, channels + 1, *grid))
    wide = numbers.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    pattern = pyramids(side).to(images_BCHW)
    pattern = torch.where(wide[:, -1:] < 0, pattern.repeat(grid), pattern.T.repeat(grid)) * random_signs(wide[:, :-1])
    top, left = (height - pattern.shape[2]) // 2, (width - pattern.shape[3]) // 2
    framed = functional.pad(pattern, (left, width - pattern.shape[3] - left, top, height - pattern.shape[2] - top))
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(framed), images_BCHW)


def change_window_l2(points_bCHW: Tensor, images_bCHW: Tensor, numbers: Tensor, side: int, ball: Ball) -> Tensor:
    """Moves the norm of one window to another, which gets pyramids of random sign added (algorithm 3)."""
    channels = points_bCHW.shape[1]
    side = min(max(side, 3) | 1, *points_bCHW.shape[2:])  # odd, and large enough for two pyramids
    change = points_bCHW - images_bCHW
    gaining, losing = (Window.at(numbers[:, channels + at :], side, change) for at in (0, 2))
    stamp = gaining.stamp(pyramids(side).to(change), numbers[:, -1] < 0)
    new_window = normalise_planes(
        random_signs(numbers[:, :channels])[:, :, None, None] * stamp + normalise_planes(change * gaining.mask())
    )
    either = gaining.mask() | losing.mask()
    unused = (ball.epsilon**2 - change.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0) / channels
    budget = ((change * either).square().sum(dim=(2, 3), keepdim=True) + unused).sqrt()
    moved = change * ~either + new_window * budget
    return ball.project(images_bCHW + ball.epsilon * ball.steepest(moved), images_bCHW)


def normalise_planes(planes_bCHW: Tensor) -> Tensor:
    """Scales every channel of every image to norm 1; zeros stay zeros."""
    lengths: Tensor = torch.linalg.vector_norm(planes_bCHW, dim=(2, 3), keepdim=True)
    return planes_bCHW / lengths.clamp_min(TINY)


def pyramids(side: int) -> Tensor:
    """Returns a positive pyramid above a negative one, of equal norm and of norm 1 together; (s, s), equation 2."""
    halves = [normalise_planes(pyramid(height, side)[None, None])[0, 0] for height in (side // 2, side - side // 2)]
    return normalise_planes(torch.cat([halves[0], -halves[1]])[None, None])[0, 0]


def pyramid(height: int, width: int) -> Tensor:
    """Returns a sum of concentric squares; the one that reaches j - 1 pixels from the centre has height 1 / j^2."""
    rows, columns = ((torch.arange(length) - length // 2).abs() for length in (height, width))
    thickness = 1 / torch.arange(1, max(height, width) // 2 + 2) ** 2
    return thickness.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns[None])]

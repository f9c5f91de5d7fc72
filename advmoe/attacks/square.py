"""Square Attack: random search over square windows, from scores alone (Andriushchenko et al. 2020, arXiv 1912.00049).

The margin is the loss and the schedule of window sizes is stretched to the budget, as in AutoAttack (Croce & Hein 2020,
arXiv 2003.01690). As in the paper, and unlike AutoAttack's code, a window may touch every edge and each image has
windows of its own.

Shapes: B batch, b images still open, C channel, H/W pixels, s side of a window, h/w rows and columns of tiles.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import TINY, Ball, Draws
from advmoe.attacks.black_box import BestPoints
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.core.settings import PositiveInt, Settings

# section 3.2: the share of pixels in a window halves after so many queries of 10,000
SCHEDULE = 10_000
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
CHUNK = 100  # queries whose random numbers are drawn at once: few draws, and 500 images need 1.6 MB
PLACES = 5  # random numbers of a query besides one sign per channel: two windows' places and an orientation


class Square(Settings):
    """`queries` is the budget of each image, its first guess included; `p_init` the share of pixels changed at first.

    The standard is 5000 and 0.8 (AutoAttack); the paper itself has 10000, 0.05 in L-inf and 0.1 in L2.
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
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """The first point found that fools the model, else the one of highest margin; inside the ball and [0, 1]."""
    start, change = (stripes, recolour) if ball.norm == "linf" else (tiles, shift)
    best = BestPoints(model, images_BCHW, labels_B, fooled)
    best.offer(start(images_BCHW, ball, draws))
    batch, channels, height, width = images_BCHW.shape
    for query in range(1, settings.queries):
        rows, turn = best.open, (query - 1) % CHUNK
        if not len(rows):
            break
        if turn == 0:
            numbers = images_BCHW.new_zeros(batch, CHUNK, channels + PLACES)
            numbers[rows] = draws.pick(rows).uniform(numbers[rows])
        side = window_side(query - 1, settings, height, width)
        best.offer(change(best.points[rows], images_BCHW[rows], numbers[rows, turn], side, ball))
    return best.points


def window_side(change: int, settings: Square, height: int, width: int) -> int:
    """Side of the window of the change numbered `change`, counted from 0: wide at first, one pixel at the end."""
    progress = int(change / settings.queries * SCHEDULE)
    share = settings.p_init / 2 ** sum(progress > limit for limit in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


@dataclass(frozen=True)
class Window:
    """A square in each image: how far each row (b, H) and column (b, W) lies from the square's first one."""

    rows_bH: Tensor
    columns_bW: Tensor
    side: int

    @classmethod
    def at(cls, numbers_b2: Tensor, side: int, images_bCHW: Tensor) -> "Window":
        """The window whose place two numbers in [-1, 1] say, all places alike likely."""
        height, width = images_bCHW.shape[2:]
        return cls(distances(numbers_b2[:, 0], side, height), distances(numbers_b2[:, 1], side, width), side)

    def mask(self) -> Tensor:
        """Which pixels lie inside, (b, 1, H, W) bool."""
        rows = (self.rows_bH >= 0) & (self.rows_bH < self.side)
        columns = (self.columns_bW >= 0) & (self.columns_bW < self.side)
        return rows[:, None, :, None] & columns[:, None, None, :]

    def stamp(self, pattern_ss: Tensor, upright_b: Tensor) -> Tensor:
        """The pattern, laid down at the window and 0 elsewhere, (b, 1, H, W); transposed where not `upright_b`."""
        rows = self.rows_bH.clamp(0, self.side - 1)[:, None, :, None]
        columns = self.columns_bW.clamp(0, self.side - 1)[:, None, None, :]
        laid = torch.where(upright_b[:, None, None, None], pattern_ss[rows, columns], pattern_ss[columns, rows])
        return laid * self.mask()


def distances(numbers_b: Tensor, side: int, length: int) -> Tensor:
    """Where each of `length` pixels lies, counted from the first of a random run of `side` of them; (b, length)."""
    places = length - side + 1
    first_b = ((numbers_b + 1) / 2 * places).long().clamp_max(places - 1)
    return torch.arange(length, device=numbers_b.device) - first_b[:, None]


def signs(numbers: Tensor) -> Tensor:
    """-1 or 1; never 0, unlike torch.sign."""
    return torch.where(numbers < 0, -1, 1).to(numbers)


# ---- L-inf: every pixel at plus or minus epsilon (section 3.3)


def stripes(images_BCHW: Tensor, ball: Ball, draws: Draws) -> Tensor:
    """Vertical stripes one pixel wide, of random sign in each channel."""
    return ball.project(images_BCHW + ball.epsilon * signs(draws.uniform(images_BCHW[:, :, :1])), images_BCHW)


def recolour(points_bCHW: Tensor, images_bCHW: Tensor, numbers: Tensor, side: int, ball: Ball) -> Tensor:
    """A window pushed to one end of the ball, up or down in each channel; 2 epsilon reach it from anywhere."""
    channels = points_bCHW.shape[1]
    push = 2 * ball.epsilon * signs(numbers[:, :channels])[:, :, None, None]
    inside = Window.at(numbers[:, channels:], side, points_bCHW).mask()
    return ball.project(points_bCHW + push * inside, images_bCHW)


# ---- L2: the whole budget spent, moved from window to window (section 3.4)


def tiles(images_BCHW: Tensor, ball: Ball, draws: Draws) -> Tensor:
    """Five by five (more where the image is not square) pyramids of random sign, in both orientations."""
    batch, channels, height, width = images_BCHW.shape
    side = max(min(height, width) // 5, 1)
    grid = (height // side, width // side)
    numbers = draws.uniform(images_BCHW.new_empty(batch, channels + 1, *grid))
    wide = numbers.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    pattern = pyramids(side).to(images_BCHW)
    laid = torch.where(wide[:, -1:] < 0, pattern.repeat(grid), pattern.T.repeat(grid)) * signs(wide[:, :-1])
    top, left = (height - laid.shape[2]) // 2, (width - laid.shape[3]) // 2
    framed = functional.pad(laid, (left, width - laid.shape[3] - left, top, height - laid.shape[2] - top))
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(framed), images_BCHW)


def shift(points_bCHW: Tensor, images_bCHW: Tensor, numbers: Tensor, side: int, ball: Ball) -> Tensor:
    """One window's budget is given to another, where pyramids of random sign bend what was there (algorithm 3)."""
    channels = points_bCHW.shape[1]
    side = min(max(side, 3) | 1, *points_bCHW.shape[2:])  # odd, and wide enough for two pyramids
    change = points_bCHW - images_bCHW
    gains, loses = (Window.at(numbers[:, channels + at :], side, change) for at in (0, 2))
    stamped = gains.stamp(pyramids(side).to(change), numbers[:, -1] < 0)
    bent = unit(signs(numbers[:, :channels])[:, :, None, None] * stamped + unit(change * gains.mask()))
    either = gains.mask() | loses.mask()
    unused = (ball.epsilon**2 - change.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0) / channels
    budget = ((change * either).square().sum(dim=(2, 3), keepdim=True) + unused).sqrt()
    moved = change * ~either + bent * budget
    return ball.project(images_bCHW + ball.epsilon * ball.steepest(moved), images_bCHW)


def unit(planes_bCHW: Tensor) -> Tensor:
    """Every channel of every image scaled to norm 1; one that is all 0 stays so."""
    lengths: Tensor = torch.linalg.vector_norm(planes_bCHW, dim=(2, 3), keepdim=True)
    return planes_bCHW / lengths.clamp_min(TINY)


def pyramids(side: int) -> Tensor:
    """A pyramid above a pit, each half of the square and of norm 1, together of norm 1; (s, s), equation 2."""
    halves = [unit(pyramid(height, side)[None, None])[0, 0] for height in (side // 2, side - side // 2)]
    return unit(torch.cat([halves[0], -halves[1]])[None, None])[0, 0]


def pyramid(height: int, width: int) -> Tensor:
    """Concentric squares on top of each other, the one that reaches j - 1 pixels from the middle 1 / j^2 thick."""
    rows, columns = ((torch.arange(length) - length // 2).abs() for length in (height, width))
    thickness = 1 / torch.arange(1, max(height, width) // 2 + 2) ** 2
    return thickness.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns[None])]

"""The set an attack may choose from: the epsilon ball of a norm around an image, cut with the pixel box [0, 1].

Shapes: B batch, C channel, H/W pixels.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from advmoe.core.settings import PIXEL_LEVELS

Norm = Literal["linf", "l2"]
ORDER: dict[Norm, float] = {"linf": torch.inf, "l2": 2.0}  # of the norm, as PyTorch wants it
TINY = 1e-12  # keeps divisions by a norm finite; far below one pixel level


class Draws(Protocol):
    """Where an attack's random numbers come from: one stream per batch in training, one per image in evaluation."""

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [-1, 1], in the shape and on the device of `like`."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, in the shape and on the device of `like`."""
        ...

    def pick(self, rows: Tensor) -> "Draws":
        """The same streams for some of the images only: `rows` (b,) numbers them within the batch."""
        ...


class Ball(Protocol):
    """What an iterative attack needs of a norm; images, points and directions are (B, C, H, W)."""

    @property
    def norm(self) -> Norm:
        """Its name."""
        ...

    @property
    def epsilon(self) -> float:
        """The radius, in units of the pixel range [0, 1]."""
        ...

    def resized(self, epsilon: float) -> "Ball":
        """The ball of the same norm with another radius."""
        ...

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """The points, brought back into the ball around `images` and into the pixel box."""
        ...

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of unit norm that raises a linear function fastest."""
        ...

    def start(self, images: Tensor, draws: Draws) -> Tensor:
        """A random point of the ball and the box."""
        ...


@dataclass(frozen=True)
class LInf:
    """Every pixel may change by at most epsilon."""

    norm: ClassVar[Norm] = "linf"
    epsilon: float

    def resized(self, epsilon: float) -> "LInf":
        return LInf(epsilon)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        # two clamps: first the ball, then the box; the image itself lies in both, so the second keeps the first
        return torch.minimum(torch.maximum(points, images - self.epsilon), images + self.epsilon).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def start(self, images: Tensor, draws: Draws) -> Tensor:
        return self.project(images + self.epsilon * draws.uniform(images), images)


@dataclass(frozen=True)
class L2:
    """The Euclidean norm of the change, over all pixels and channels of an image, is at most epsilon."""

    norm: ClassVar[Norm] = "l2"
    epsilon: float

    def resized(self, epsilon: float) -> "L2":
        return L2(epsilon)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        # the ball first: clamping to the box afterwards only shortens the change, pixel by pixel, so both hold
        change = points - images
        return (images + change * (self.epsilon / _euclidean(change).clamp_min(TINY)).clamp_max(1)).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        # largest component first: the square of a gradient of 1e-25, which points somewhere all the same, is 0
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return scaled / _euclidean(scaled).clamp_min(TINY)

    def start(self, images: Tensor, draws: Draws) -> Tensor:
        direction = draws.normal(images)
        dimensions = images[0].numel()
        radius = ((draws.uniform(images[:, :1, :1, :1]) + 1) / 2) ** (1 / dimensions)
        return self.project(images + self.epsilon * radius * direction / _euclidean(direction).clamp_min(TINY), images)


def length(change_BCHW: Tensor, norm: Norm) -> Tensor:
    """The norm of each image's change (B,), in the precision that the change comes in."""
    length_B: Tensor = torch.linalg.vector_norm(change_BCHW.flatten(1), ORDER[norm], dim=1)
    return length_B


def to_levels(points_NCHW: Tensor, images_NCHW: Tensor, epsilon: float) -> Tensor:
    """Points of the L-inf ball around uint8 images as uint8, not a level further from them than epsilon allows."""
    levels = int(epsilon * PIXEL_LEVELS + 1e-6)  # floor, but 8/255 is eight levels
    around = images_NCHW.int()
    rounded = (points_NCHW * PIXEL_LEVELS).round().int()
    return rounded.clamp(around - levels, around + levels).clamp(0, PIXEL_LEVELS).to(torch.uint8)


def _euclidean(points_BCHW: Tensor) -> Tensor:
    length_B111: Tensor = torch.linalg.vector_norm(points_BCHW, dim=(1, 2, 3), keepdim=True)
    return length_B111

"""The feasible set of an attack: the epsilon ball of a norm around an image, intersected with the pixel box [0, 1].

Shapes: B batch, C channel, H/W pixels.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from advmoe.core.settings import PIXEL_LEVELS

Norm = Literal["linf", "l2"]
NORM_ORDER: dict[Norm, float] = {"linf": torch.inf, "l2": 2.0}  # `ord` of torch.linalg.vector_norm
TINY = 1e-12  # avoids division by zero norms; far below one pixel level


class RandomStream(Protocol):
    """Source of an attack's random numbers: one stream per batch in training, one per image in evaluation."""

    def uniform(self, like: Tensor) -> Tensor:
        """Returns uniform numbers in [-1, 1] with the shape, dtype and device of `like`."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Returns standard normal numbers with the shape, dtype and device of `like`."""
        ...

    def pick(self, rows: Tensor) -> "RandomStream":
        """Returns the streams of the images with indices `rows` (b,) of the batch; their state is shared."""
        ...


class Ball(Protocol):
    """A norm ball, as iterative attacks use it; images, points and directions are (B, C, H, W)."""

    @property
    def norm(self) -> Norm:
        """The name of the norm."""
        ...

    @property
    def epsilon(self) -> float:
        """The radius, in units of the pixel range [0, 1]."""
        ...

    def resized(self, epsilon: float) -> "Ball":
        """Returns the ball of the same norm with radius `epsilon`."""
        ...

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """Returns the points projected into the ball around `images` and into the pixel box."""
        ...

    def steepest(self, gradient: Tensor) -> Tensor:
        """Returns the direction of unit norm with the largest inner product with `gradient`."""
        ...

    def start(self, images: Tensor, draws: RandomStream) -> Tensor:
        """Returns a random point of the ball, projected into the box."""
        ...


@dataclass(frozen=True)
class LInf:
    """The change of every pixel is at most epsilon."""

    norm: ClassVar[Norm] = "linf"
    epsilon: float

    def resized(self, epsilon: float) -> "LInf":
        return LInf(epsilon)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        # first the ball, then the box; the image lies in both, so the second clamp does not leave the ball
        return torch.minimum(torch.maximum(points, images - self.epsilon), images + self.epsilon).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def start(self, images: Tensor, draws: RandomStream) -> Tensor:
        return self.project(images + self.epsilon * draws.uniform(images), images)


@dataclass(frozen=True)
class L2:
    """The Euclidean norm of the change of an image, over all pixels and channels, is at most epsilon."""

    norm: ClassVar[Norm] = "l2"
    epsilon: float

    def resized(self, epsilon: float) -> "L2":
        return L2(epsilon)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        # first the ball: clamping to the box afterwards only shortens the change, pixel by pixel, so both hold
        change = points - images
        return (images + change * (self.epsilon / _euclidean(change).clamp_min(TINY)).clamp_max(1)).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        # divided by the largest component first: the square of a tiny gradient (1e-25) would underflow to 0
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return scaled / _euclidean(scaled).clamp_min(TINY)

    def start(self, images: Tensor, draws: RandomStream) -> Tensor:
        direction = draws.normal(images)
        dimensions = images[0].numel()
        radius = ((draws.uniform(images[:, :1, :1, :1]) + 1) / 2) ** (1 / dimensions)
        return self.project(images + self.epsilon * radius * direction / _euclidean(direction).clamp_min(TINY), images)


def perturbation_norm(change_BCHW: Tensor, norm: Norm) -> Tensor:
    """Returns the norm of each image's perturbation (B,), in the dtype of the perturbation."""
    norm_B: Tensor = torch.linalg.vector_norm(change_BCHW.flatten(1), NORM_ORDER[norm], dim=1)
    return norm_B


def round_to_uint8(points_NCHW: Tensor, images_NCHW: Tensor, epsilon: float) -> Tensor:
    """Returns points of the L-inf ball around uint8 images rounded to uint8, within epsilon of the images."""
    levels = int(epsilon * PIXEL_LEVELS + 1e-6)  # floor, with a tolerance: 8/255 is eight levels
    center_NCHW = images_NCHW.int()
    rounded = (points_NCHW * PIXEL_LEVELS).round().int()
    return rounded.clamp(center_NCHW - levels, center_NCHW + levels).clamp(0, PIXEL_LEVELS).to(torch.uint8)


def _euclidean(points_BCHW: Tensor) -> Tensor:
    norm_B111: Tensor = torch.linalg.vector_norm(points_BCHW, dim=(1, 2, 3), keepdim=True)
    return norm_B111

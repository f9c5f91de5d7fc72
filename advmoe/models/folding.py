"""A convolution with its BatchNorm folded in, and what it is on maps of a few pixels: a matrix.

A 3x3 kernel on a map of 2x2 pixels meets padding with five of its nine taps, on a single pixel with eight. Written out
as a matrix from all input values to all output values, the map costs what it holds: forwards and back to the pixels of
120 images, nine experts side by side, one thread of a CPU with AMX: 2x2 to 2x2 in 0.40 of the time, 2x2 to 1x1 in 0.23,
1x1 in 0.25. Digits of 8 pixels spend half of a ResNet-18 on such maps.

Shapes: E experts (groups of channels), O and I channels out and in, k side of a kernel, P and Q pixels in and out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALL = 4  # pixels of a map; on 3x3 a matrix multiplies nothing less than a 3x3 kernel, and on 4x4 it lost


def small(images_BCHW: Tensor) -> bool:
    """Whether a map is small enough for a matrix; on a GPU never, where it has not been measured."""
    height, width = images_BCHW.shape[-2:]
    return images_BCHW.device.type == "cpu" and height * width <= SMALL


class Folding:
    """One convolution in each form and type that was asked for, kept: its weights do not change, except by `renew`."""

    def __init__(self, fold: Callable[[], tuple[Tensor, Tensor]], conv: nn.Conv2d) -> None:
        """`fold` gives weight (E * O, I, k, k) and bias (E * O,); `conv` is a layer with its kernel and stride."""
        self.fold, self.conv = fold, conv
        self.kept: dict[tuple[torch.dtype, tuple[int, int] | None], tuple[Tensor, Tensor]] = {}

    def convolution(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight (E * O, I, k, k) and bias (E * O,)."""
        return self._form(dtype, None)

    def multiplied(self, maps_EBHWI: Tensor, dtype: torch.dtype) -> Tensor:
        """The convolution of small maps, (E, B, H, W, I) -> (E, B, H', W', O)."""
        experts, batch, height, width, _ = maps_EBHWI.shape
        matrices, biases = self._form(dtype, (height, width))
        flat = torch.baddbmm(biases, maps_EBHWI.flatten(2), matrices)
        rows = len(_along(height, self.conv, 0))
        return flat.view(experts, batch, rows, -1, self.conv.out_channels)

    def renew(self) -> None:
        """The layers' weights have changed: fold those of now, into the memory of those before."""
        for (_, sides), kept in self.kept.items():
            for old, new in zip(kept, self._folded(sides), strict=True):
                old.copy_(new)

    def clear(self) -> None:
        """Keep nothing."""
        self.kept.clear()

    def _form(self, dtype: torch.dtype, sides: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        if (dtype, sides) not in self.kept:
            weight, bias = self._folded(sides)
            self.kept[dtype, sides] = weight.to(dtype), bias.to(dtype)
        return self.kept[dtype, sides]

    @torch.no_grad()
    def _folded(self, sides: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Weight and bias, as a convolution or, for `sides`, as matrices (E, P * I, Q * O) and biases (E, 1, Q * O)."""
        weight, bias = self.fold()
        if sides is None:
            return weight, bias
        met_QP, channels = taps(self.conv, sides), self.conv.out_channels
        kernels = functional.pad(weight.flatten(2), (0, 1))  # one more tap, of zeros, where two pixels do not meet
        each_EOIQP = kernels[:, :, met_QP].view(-1, channels, weight.shape[1], *met_QP.shape)
        matrices = each_EOIQP.permute(0, 4, 2, 3, 1).flatten(3, 4).flatten(1, 2)
        return matrices, bias.view(-1, 1, channels).repeat(1, 1, len(met_QP))


def taps(conv: nn.Conv2d, sides: tuple[int, int]) -> Tensor:
    """The tap, (Q, P), with which each output pixel weighs each input pixel; one past the last where with none."""
    rows, columns = conv.kernel_size
    down, right = (_along(side, conv, axis) for axis, side in enumerate(sides))
    down, right = down[:, None, :, None], right[None, :, None, :]
    met = (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
    return torch.where(met, down * columns + right, rows * columns).flatten(2, 3).flatten(0, 1)


def _along(side: int, conv: nn.Conv2d, axis: int) -> Tensor:
    """How far each pixel (in) of a side lies behind a kernel's first tap, for each pixel (out); (out, in)."""
    assert not isinstance(conv.padding, str)
    kernel, stride, padding = (each[axis] for each in (conv.kernel_size, conv.stride, conv.padding))
    starts = torch.arange(0, side + 2 * padding - kernel + 1, stride) - padding
    return torch.arange(side) - starts[:, None]

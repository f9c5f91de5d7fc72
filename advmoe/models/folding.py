"""A convolution with its BatchNorm folded in, and what it is on maps of a few pixels: a matrix.

A 3x3 kernel on a map of 2x2 pixels meets padding with five of its nine taps, on a single pixel with eight. Written out
as a matrix from all input values to all output values, the map costs what it holds: forwards and back to the pixels of
120 images, nine experts side by side, one thread of a CPU with AMX: 2x2 to 2x2 in 0.40 of the time, 2x2 to 1x1 in 0.23,
1x1 in 0.25, once the matrix is there. Digits of 8 pixels spend half of a ResNet-18 on such maps.

Shapes: E experts (groups of channels), O and I channels out and in, k side of a kernel, P and Q pixels in and out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_PIXELS = 4  # pixels of a map; on 3x3 a matrix multiplies nothing less than a 3x3 kernel, and on 4x4 it lost

Sides = tuple[int, int]  # height and width
Form = tuple[Tensor, Tensor]  # weight and bias
Affine = tuple[Tensor, Tensor, Tensor]  # weight (O, I, k, k), its scale (O,), bias (O,)
Fold = Callable[[], Sequence[Affine]]  # of each expert


def is_small(images_BCHW: Tensor) -> bool:
    """Whether a map is small enough for a matrix; on a GPU and for a compiler never: there it has not been measured."""
    measured = images_BCHW.device.type == "cpu" and not torch.compiler.is_compiling()
    return measured and images_BCHW.shape[-2] * images_BCHW.shape[-1] <= MAX_PIXELS


def is_faster(images_BCHW: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a matrix is the faster way. A 1x1 kernel of stride 1 meets no padding: on one pixel it is a matrix as it
    stands, on more it would be one that is mostly zeros.
    """
    lean = conv.kernel_size == conv.stride == (1, 1)
    return is_small(images_BCHW) and not (lean and images_BCHW.shape[-2:] != (1, 1))


class Folding:
    """One convolution in each form and type that was asked for, kept: its weights do not change, except by `renew`.

    What folds it is given with every call and not kept: it belongs to a layer that keeps this.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """`conv` is a layer with its kernel and stride."""
        self.conv = conv
        self.exact: dict[Sides | None, Form] = {}
        self.kept: dict[tuple[torch.dtype, Sides | None], Form] = {}

    def convolution(self, fold: Fold, dtype: torch.dtype) -> Form:
        """Weight (E * O, I, k, k) and bias (E * O,)."""
        return self._form(fold, dtype, None)

    def multiplied(self, fold: Fold, maps_EBHWI: Tensor, dtype: torch.dtype) -> Tensor:
        """The convolution of small maps, (E, B, H, W, I) -> (E, B, H', W', O)."""
        experts, batch, height, width, _ = maps_EBHWI.shape
        matrices, biases = self._form(fold, dtype, (height, width))
        flat = torch.baddbmm(biases, maps_EBHWI.flatten(2), matrices)
        plan = _plan(*self._kernel, (height, width))
        return flat.view(experts, batch, plan.height, plan.width, self.conv.out_channels)

    def renew(self, fold: Fold) -> None:
        """The weights have changed: fold those of now, into the memory of those before, which recordings read."""
        for sides, form in self.exact.items():
            _overwrite(form, self._folded(fold, sides))
        for (_, sides), form in self.kept.items():
            _overwrite(form, self.exact[sides])

    def clear(self) -> None:
        """Keep nothing."""
        self.exact.clear()
        self.kept.clear()

    def _form(self, fold: Fold, dtype: torch.dtype, sides: Sides | None) -> Form:
        if (dtype, sides) not in self.kept:
            if sides not in self.exact:
                self.exact[sides] = self._folded(fold, sides)
            weight, bias = self.exact[sides]
            self.kept[dtype, sides] = weight.to(dtype), bias.to(dtype)
        return self.kept[dtype, sides]

    @torch.no_grad()
    def _folded(self, fold: Fold, sides: Sides | None) -> Form:
        """Weight and bias, as a convolution or, for `sides`, as matrices (E, P * I, Q * O) and biases (E, 1, Q * O)."""
        weights, scales, biases = zip(*fold(), strict=True)
        if sides is None:
            scaled = [weight * scale.view(-1, 1, 1, 1) for weight, scale in zip(weights, scales, strict=True)]
            return _one(scaled), torch.cat(biases)
        plan, pairs = _plan(*self._kernel, sides), zip(weights, scales, strict=True)
        each_bias = torch.stack(biases)[:, None].repeat(1, 1, plan.height * plan.width)
        if sides == (1, 1):  # one tap, and the kernels lie ready to be read as transposed matrices
            return torch.stack([plan.kernels(*pair)[:, :, 0] for pair in pairs]).transpose(1, 2), each_bias
        return torch.stack([plan.matrix(*pair) for pair in pairs]), each_bias

    @property
    def _kernel(self) -> tuple[Sides, Sides, Sides]:
        size, stride, padding = self.conv.kernel_size, self.conv.stride, self.conv.padding
        assert not isinstance(padding, str)
        return (size[0], size[1]), (stride[0], stride[1]), (padding[0], padding[1])


def _one(weights: list[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    return torch.cat(weights).contiguous(memory_format=torch.channels_last)


def _overwrite(form: Form, new: Form) -> None:
    for old, tensor in zip(form, new, strict=True):
        old.copy_(tensor)


@dataclass(frozen=True)
class Plan:
    """Which taps of a kernel a map meets, `met`, by number; and where among these, (P, Q), lies the one with which an
    output pixel weighs an input pixel, one past the last where they do not meet. `height`, `width`: of what comes out.
    """

    met: Tensor
    places_PQ: Tensor
    height: int
    width: int

    def kernels(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What of a kernel (O, I, k, k), scaled (O,), the map meets: (O, I, taps)."""
        return weight.flatten(2)[:, :, self.met] * scale[:, None, None]

    def matrix(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The same as a matrix (P * I, Q * O), channels the fastest to change."""
        channels_out, channels_in = weight.shape[:2]
        kernels_TIO = self.kernels(weight, scale).permute(2, 1, 0)
        kernels_TIO = functional.pad(kernels_TIO, (0, 0, 0, 0, 0, 1))  # a tap of zeros, where pixels do not meet
        each_PQIO = kernels_TIO[self.places_PQ.flatten()].view(*self.places_PQ.shape, channels_in, channels_out)
        return each_PQIO.transpose(1, 2).flatten(2, 3).flatten(0, 1)


@lru_cache
def _plan(kernel: Sides, stride: Sides, padding: Sides, sides: Sides) -> Plan:
    down, right = (_along(*axis) for axis in zip(sides, kernel, stride, padding, strict=True))
    height, width, (rows, columns) = len(down), len(right), kernel
    down, right = down[:, None, :, None], right[None, :, None, :]
    inside = (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
    taps_PQ = torch.where(inside, down * columns + right, rows * columns).flatten(2, 3).flatten(0, 1).T
    met = torch.tensor(sorted({*taps_PQ.flatten().tolist()} - {rows * columns}))
    return Plan(met, torch.searchsorted(met, taps_PQ.contiguous()), height, width)


def _along(side: int, kernel: int, stride: int, padding: int) -> Tensor:
    """How far each pixel (in) of a side lies behind a kernel's first tap, for each pixel (out); (out, in)."""
    starts = torch.arange(0, side + 2 * padding - kernel + 1, stride) - padding
    return torch.arange(side) - starts[:, None]

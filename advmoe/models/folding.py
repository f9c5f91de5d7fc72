"""Convolutions with folded BatchNorm, computed as matrix products on feature maps of a few pixels.

On a map of 2x2 pixels five of the nine taps of a 3x3 kernel fall on padding, on a single pixel eight. A matrix from all
input values to all output values skips these. Measured for forward pass and input gradient of 120 images, nine grouped
experts, one thread of a CPU with AMX: 2x2 to 2x2 takes 0.40 of the time, 2x2 to 1x1 0.23, 1x1 0.25, with the matrix
precomputed. On digits of 8x8 pixels a ResNet-18 spends half of its time on such maps.

Shapes: E experts (groups of channels), O and I channels out and in, k side of a kernel, P and Q pixels in and out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_PIXELS = 4  # of a map; at 3x3 the matrix has no fewer products than a 3x3 kernel, and at 4x4 it was slower

MapSize = tuple[int, int]  # height and width
WeightAndBias = tuple[Tensor, Tensor]  # weight and bias
FoldedFilters = tuple[Tensor, Tensor, Tensor]  # weight (O, I, k, k), its scale (O,), bias (O,)
FoldFn = Callable[[], Sequence[FoldedFilters]]  # one entry per expert


def is_small_map(images_BCHW: Tensor) -> bool:
    """Returns whether a map is small enough for a matrix; never on a GPU or under torch.compile (not measured)."""
    measured = images_BCHW.device.type == "cpu" and not torch.compiler.is_compiling()
    return measured and images_BCHW.shape[-2] * images_BCHW.shape[-1] <= MAX_PIXELS


def is_matrix_faster(images_BCHW: Tensor, conv: nn.Conv2d) -> bool:
    """Returns whether a matrix product is faster. A 1x1 kernel of stride 1 has no padding: on a single pixel it is a
    matrix already, on more pixels the matrix would be mostly zeros.
    """
    pointwise = conv.kernel_size == conv.stride == (1, 1)
    return is_small_map(images_BCHW) and not (pointwise and images_BCHW.shape[-2:] != (1, 1))


class FoldedConvCache:
    """Caches the folded weights of one convolution, for each map size and dtype in use; only `refold` changes them.

    `fold` is an argument of every call and not stored, to avoid a reference cycle with the layer that owns this cache.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """`conv` provides kernel size, stride and padding."""
        self.conv = conv
        self.uncast: dict[MapSize | None, WeightAndBias] = {}
        self.cast: dict[tuple[torch.dtype, MapSize | None], WeightAndBias] = {}

    def conv_weights(self, fold: FoldFn, dtype: torch.dtype) -> WeightAndBias:
        """Returns weight (E * O, I, k, k) and bias (E * O,) of a grouped convolution."""
        return self._cached(fold, dtype, None)

    def apply_matrix(self, fold: FoldFn, maps_EBHWI: Tensor, dtype: torch.dtype) -> Tensor:
        """Convolves small maps by one matrix product per expert, (E, B, H, W, I) -> (E, B, H', W', O)."""
        experts, batch, height, width, _ = maps_EBHWI.shape
        matrices, biases = self._cached(fold, dtype, (height, width))
        flat = torch.baddbmm(biases, maps_EBHWI.flatten(2), matrices)
        layout = _tap_layout(*self._kernel, (height, width))
        return flat.view(experts, batch, layout.height, layout.width, self.conv.out_channels)

    def refold(self, fold: FoldFn) -> None:
        """Folds the current weights into the memory of the previous ones, which captured CUDA graphs read."""
        for map_size, cached in self.uncast.items():
            _overwrite(cached, self._folded(fold, map_size))
        for (_, map_size), cached in self.cast.items():
            _overwrite(cached, self.uncast[map_size])

    def clear(self) -> None:
        """Empties the cache."""
        self.uncast.clear()
        self.cast.clear()

    def _cached(self, fold: FoldFn, dtype: torch.dtype, map_size: MapSize | None) -> WeightAndBias:
        if (dtype, map_size) not in self.cast:
            if map_size not in self.uncast:
                self.uncast[map_size] = self._folded(fold, map_size)
            weight, bias = self.uncast[map_size]
            self.cast[dtype, map_size] = weight.to(dtype), bias.to(dtype)
        return self.cast[dtype, map_size]

    @torch.no_grad()
    def _folded(self, fold: FoldFn, map_size: MapSize | None) -> WeightAndBias:
        """Weight and bias of a convolution or, for a `map_size`, matrices (E, P * I, Q * O), biases (E, 1, Q * O)."""
        weights, scales, biases = zip(*fold(), strict=True)
        if map_size is None:
            scaled = [weight * scale.view(-1, 1, 1, 1) for weight, scale in zip(weights, scales, strict=True)]
            return _concatenate(scaled), torch.cat(biases)
        layout, pairs = _tap_layout(*self._kernel, map_size), zip(weights, scales, strict=True)
        bias_E1O = torch.stack(biases)[:, None].repeat(1, 1, layout.height * layout.width)
        if map_size == (1, 1):  # one tap: the kernels are the transposed matrices
            return torch.stack([layout.kernels(*pair)[:, :, 0] for pair in pairs]).transpose(1, 2), bias_E1O
        return torch.stack([layout.matrix(*pair) for pair in pairs]), bias_E1O

    @property
    def _kernel(self) -> tuple[MapSize, MapSize, MapSize]:
        size, stride, padding = self.conv.kernel_size, self.conv.stride, self.conv.padding
        assert not isinstance(padding, str)
        return (size[0], size[1]), (stride[0], stride[1]), (padding[0], padding[1])


def _concatenate(weights: list[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    return torch.cat(weights).contiguous(memory_format=torch.channels_last)


def _overwrite(cached: WeightAndBias, new: WeightAndBias) -> None:
    for old, tensor in zip(cached, new, strict=True):
        old.copy_(tensor)


@dataclass(frozen=True)
class TapLayout:
    """The taps of a kernel that overlap a map of a given size.

    `used_taps`: their indices in the kernel. `tap_index_PQ`: for each input and output pixel the position in
    `used_taps` of the tap that connects them, len(used_taps) if none does. `height`, `width`: size of the output map.
    """

    used_taps: Tensor
    tap_index_PQ: Tensor
    height: int
    width: int

    def kernels(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Returns the used taps of a kernel (O, I, k, k), scaled by (O,): (O, I, taps)."""
        return weight.flatten(2)[:, :, self.used_taps] * scale[:, None, None]

    def matrix(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Returns the convolution as a matrix (P * I, Q * O), channels varying fastest."""
        channels_out, channels_in = weight.shape[:2]
        kernels_TIO = self.kernels(weight, scale).permute(2, 1, 0)
        kernels_TIO = functional.pad(kernels_TIO, (0, 0, 0, 0, 0, 1))  # a tap of zeros for unconnected pixels
        blocks_PQIO = kernels_TIO[self.tap_index_PQ.flatten()].view(*self.tap_index_PQ.shape, channels_in, channels_out)
        return blocks_PQIO.transpose(1, 2).flatten(2, 3).flatten(0, 1)


@lru_cache
def _tap_layout(kernel: MapSize, stride: MapSize, padding: MapSize, map_size: MapSize) -> TapLayout:
    down, right = (_tap_offsets(*axis) for axis in zip(map_size, kernel, stride, padding, strict=True))
    height, width, (rows, columns) = len(down), len(right), kernel
    down, right = down[:, None, :, None], right[None, :, None, :]
    inside = (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
    taps_PQ = torch.where(inside, down * columns + right, rows * columns).flatten(2, 3).flatten(0, 1).T
    used_taps = torch.tensor(sorted({*taps_PQ.flatten().tolist()} - {rows * columns}))
    return TapLayout(used_taps, torch.searchsorted(used_taps, taps_PQ.contiguous()), height, width)


def _tap_offsets(side: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Offset of each input pixel from the first tap of the kernel at each output pixel, along one axis; (out, in)."""
    starts = torch.arange(0, side + 2 * padding - kernel + 1, stride) - padding
    return torch.arange(side) - starts[:, None]

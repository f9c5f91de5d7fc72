"""Layers shared by all networks: pixel normalisation, and convolution + BatchNorm with optional folding.

Shapes: B batch, C channel, H/W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.folding import FoldedConvCache, FoldedFilters, is_matrix_faster

CHANNELS_OF_A_REGISTER = 8  # float32 numbers in 256 bits


class Normalize(nn.Module):
    """Channel-wise (x - mean) / std as the first layer of a model, so that attacks work on pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - self.mean) / self.std


class Conv2d(nn.Conv2d):
    """nn.Conv2d with a workaround for a bug of oneDNN on CPUs without AVX-512 (PyTorch 2.14).

    The weight gradient of a strided 1x1 convolution with fewer than 8 input channels writes outside its memory. Such a
    layer runs without stride on every `stride`-th pixel, which computes the same.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.in_channels >= CHANNELS_OF_A_REGISTER or self.kernel_size != (1, 1) or self.stride == (1, 1):
            return super().forward(images_BCHW)
        return functional.conv2d(images_BCHW[:, :, :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm.

    In eval mode the two equal one convolution; inside `fold_batchnorm` they run as one.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.is_folded = False
        self._conv_cache = FoldedConvCache(self.conv)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if not self.is_folded:
            normed: Tensor = self.norm(self.conv(images_BCHW))
            return normed
        dtype = compute_dtype(images_BCHW)
        if is_matrix_faster(images_BCHW, self.conv):
            maps_1BHWC = images_BCHW.permute(0, 2, 3, 1)[None]  # no copy in channels_last
            return self._conv_cache.apply_matrix(self._folded_filters, maps_1BHWC, dtype)[0].permute(0, 3, 1, 2)
        weight, bias = self._conv_cache.conv_weights(self._folded_filters, dtype)
        return functional.conv2d(images_BCHW, weight, bias, self.conv.stride, self.conv.padding)

    @torch.no_grad()
    def folded_filters(self) -> FoldedFilters:
        """Returns the convolution that equals both layers in eval mode: weight, scale of each filter, bias."""
        norm = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return self.conv.weight, scale, norm.bias - norm.running_mean * scale

    def _folded_filters(self) -> list[FoldedFilters]:
        return [self.folded_filters()]

    def fold(self) -> None:
        """Runs as one convolution from now on."""
        self.is_folded = True

    def refold(self) -> None:
        """Folds the current weights into the memory of the previous folded weights."""
        self._conv_cache.refold(self._folded_filters)

    def unfold(self) -> None:
        """Runs as two layers again and frees the folded weights."""
        self.is_folded = False
        self._conv_cache.clear()


def module_structure(model: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Returns name, class and simple attributes (such as a temperature) of every module; a state_dict lacks these."""
    return [(name, type(layer).__qualname__, simple_attributes(vars(layer))) for name, layer in model.named_modules()]


def simple_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that are numbers, strings or tuples, by name; without private ones and `training`."""
    public = {name: value for name, value in attributes.items() if not name.startswith("_") and name != "training"}
    return {name: value for name, value in sorted(public.items()) if isinstance(value, int | float | str | tuple)}


def compute_dtype(images_BCHW: Tensor) -> torch.dtype:
    """Returns the dtype in which a convolution of these images runs: autocast's, or float32 without autocast."""
    device = images_BCHW.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def linear_in_float32(layer: nn.Linear, features_BF: Tensor) -> Tensor:
    """Applies the layer in float32 even under autocast: bfloat16 logits are too coarse for a loss."""
    with torch.autocast(features_BF.device.type, enabled=False):
        scores: Tensor = layer(features_BF.float())
    return scores


def initialise(model: nn.Module) -> None:
    """Initialises the convolutions: Kaiming normal, fan-out (He et al. 2015). Other layers keep PyTorch's default."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


@contextmanager
def fold_batchnorm(model: nn.Module) -> Iterator[None]:
    """Runs every ConvNorm in eval mode as one convolution, folded at its first call.

    A ConvNorm in train mode is unchanged: batch statistics cannot be folded. The weights must not change inside.
    Forward passes run in autocast's dtype, or in float32 without autocast.
    """
    # an enclosing `fold_batchnorm` has already folded its layers and unfolds them
    unfolded = [layer for layer in model.modules() if isinstance(layer, ConvNorm) and not layer.is_folded]
    layers = [layer for layer in unfolded if not layer.training and not layer.norm.training]
    for layer in layers:
        layer.fold()
    try:
        yield
    finally:
        for layer in layers:
            layer.unfold()

"""Layers that every network here shares: normalisation of pixels, and a convolution that knows its BatchNorm.

Shapes: B batch, C channel, H/W pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class Normalize(nn.Module):
    """Channel-wise (x - mean) / std as the first layer of a model, so that attacks only ever see pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - self.mean) / self.std


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm.

    With frozen statistics the two are one convolution; inside `folded(...)` they run as one.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self._folded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if not self._folded:
            normed: Tensor = self.norm(self.conv(images_BCHW))
            return normed
        weight, bias = self._folded[_compute_dtype(images_BCHW)]
        return functional.conv2d(images_BCHW, weight, bias, self.conv.stride, self.conv.padding)

    def fold(self, dtypes: set[torch.dtype]) -> None:
        """Precompute weight and bias of the one convolution that equals both layers in eval mode."""
        norm = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        with torch.no_grad():
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weight = self.conv.weight * scale.view(-1, 1, 1, 1)
            bias = norm.bias - norm.running_mean * scale
            self._folded = {dtype: (weight.to(dtype), bias.to(dtype)) for dtype in dtypes}

    @property
    def is_folded(self) -> bool:
        """Whether the layer runs as one convolution now."""
        return bool(self._folded)

    def unfold(self) -> None:
        """Forget the precomputed convolution."""
        self._folded = {}


def _compute_dtype(images_BCHW: Tensor) -> torch.dtype:
    device = images_BCHW.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def linear_in_float32(layer: nn.Linear, features_BF: Tensor) -> Tensor:
    """The last layer in full precision even under autocast: three bfloat16 digits are too few for a loss."""
    with torch.autocast(features_BF.device.type, enabled=False):
        scores: Tensor = layer(features_BF.float())
    return scores


def initialise(model: nn.Module) -> None:
    """Draw the convolutions' weights, Kaiming normal over the fan-out (He et al. 2015); all else keeps its default."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


@contextmanager
def folded(model: nn.Module, dtypes: set[torch.dtype]) -> Iterator[None]:
    """Run every ConvNorm in eval mode as one convolution, prepared in the given `dtypes`.

    One that is in train mode stays as it is: batch statistics cannot be folded. Weights must not change inside. Forward
    passes run in the type that autocast asks for, float32 without autocast.
    """
    # an enclosing `folded` has done it already and will undo it
    found = [layer for layer in model.modules() if isinstance(layer, ConvNorm) and not layer.is_folded]
    layers = [layer for layer in found if not layer.training and not layer.norm.training]
    for layer in layers:
        layer.fold(dtypes)
    try:
        yield
    finally:
        for layer in layers:
            layer.unfold()

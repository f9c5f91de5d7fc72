"""Layers that every network here shares: normalisation of pixels, and a convolution that knows its BatchNorm.

Shapes: B batch, C channel, H/W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.folding import Affine, Folding, is_faster


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
        self.is_folded = False
        self._folding = Folding(self.conv)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if not self.is_folded:
            normed: Tensor = self.norm(self.conv(images_BCHW))
            return normed
        dtype = compute_dtype(images_BCHW)
        if is_faster(images_BCHW, self.conv):
            maps_1BHWC = images_BCHW.permute(0, 2, 3, 1)[None]  # in channels_last nothing moves
            return self._folding.multiplied(self._affine, maps_1BHWC, dtype)[0].permute(0, 3, 1, 2)
        weight, bias = self._folding.convolution(self._affine, dtype)
        return functional.conv2d(images_BCHW, weight, bias, self.conv.stride, self.conv.padding)

    @torch.no_grad()
    def affine(self) -> Affine:
        """The one convolution that equals both layers in eval mode: weight, scale of its filters, bias."""
        norm = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return self.conv.weight, scale, norm.bias - norm.running_mean * scale

    def _affine(self) -> list[Affine]:
        return [self.affine()]

    def fold(self) -> None:
        """Run as one convolution from now on."""
        self.is_folded = True

    def refold(self) -> None:
        """The weights have changed: fold those of now, into the memory of those before."""
        self._folding.renew(self._affine)

    def unfold(self) -> None:
        """Run as two layers again, and forget the one."""
        self.is_folded = False
        self._folding.clear()


def structure(model: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """What a state_dict does not say: kinds of layers, and numbers like a temperature."""
    return [(name, type(layer).__qualname__, plain(vars(layer))) for name, layer in model.named_modules()]


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, words or tuples, by name, in alphabetical order; private ones and `training` apart."""
    kept = {name: value for name, value in attributes.items() if not name.startswith("_") and name != "training"}
    return {name: value for name, value in sorted(kept.items()) if isinstance(value, int | float | str | tuple)}


def compute_dtype(images_BCHW: Tensor) -> torch.dtype:
    """The type that a convolution of these runs in: what autocast asks for, float32 without it."""
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
def folded(model: nn.Module) -> Iterator[None]:
    """Run every ConvNorm in eval mode as one convolution, prepared when it is first needed.

    One that is in train mode stays as it is: batch statistics cannot be folded. Weights must not change inside. Forward
    passes run in the type that autocast asks for, float32 without autocast.
    """
    # an enclosing `folded` has done it already and will undo it
    found = [layer for layer in model.modules() if isinstance(layer, ConvNorm) and not layer.is_folded]
    layers = [layer for layer in found if not layer.training and not layer.norm.training]
    for layer in layers:
        layer.fold()
    try:
        yield
    finally:
        for layer in layers:
            layer.unfold()

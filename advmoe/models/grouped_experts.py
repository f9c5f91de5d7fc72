"""The experts of a mixture as one network with a group of channels for each: faster for small batches, the same logits.

PyTorch looks for a kernel anew at every convolution, for about 0.1 ms; nine small experts one after another spend more
on that than on computing. One convolution with nine groups looks once, and small maps (`advmoe.models.folding`) are one
batch of nine matrices. A GPU waits for launches of kernels even at full width: an H200 takes gradients of 128 images of
32 pixels in bfloat16 3 times as fast at width 16, 1.5 times at 64. Steps of learning stay as they are: with gradients
of weights to find, groups gained nothing at the sizes that the pipeline trains at.

Shapes: B batch, C channel, H/W pixels, E experts, K classes, F features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.folding import Affine, Folding, is_small
from advmoe.models.layers import ConvNorm, compute_dtype, linear_in_float32
from advmoe.models.mixture import MixtureOfExperts
from advmoe.models.resnet import BasicBlock, ResNet18, residual

# Measured with nine experts of widths 4 to 64 on 8 to 32 pixels, forwards and back to the pixels, on one thread of a
# CPU with AVX-512 and AMX: wide groups, or many images, compute for longer than they wait, and in groups they compute
# slower.
MAX_WIDTH = 16  # on a CPU: channels of an expert's first stage; 24 and 32 gain with a few images only, 64 never
MAX_ACTIVATIONS = {
    torch.float32: 120_000,
    torch.bfloat16: 250_000,
}  # numbers that one expert's first convolution puts out
MAX_ACTIVATIONS_GPU = 10_000_000  # an H200 gained from 65 thousand to 8 million, and lost a fifth at 34 million
MIN_BATCH = {
    torch.float32: 2,
    torch.bfloat16: 1,
}  # images; a lone one in float32 has a faster kernel, but not in groups


@contextmanager
def grouped(model: nn.Module) -> Iterator[None]:
    """Run the experts of every mixture in `model` side by side wherever they can and that is faster; others as ever.

    Inside, the model must be in eval mode and its weights must not change.
    """
    # an enclosing `side_by_side` has done it already and will undo it
    mixtures = [layer for layer in model.modules() if type(layer) is MixtureOfExperts and layer.together is None]
    for mixture in mixtures:
        mixture.together = _together(list(mixture.experts))
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.together = None


def refold_grouped(model: nn.Module) -> None:
    """Weights of a folded copy have changed: fold them anew, side by side too, into the same memory."""
    for layer in model.modules():
        if isinstance(layer, ConvNorm):
            layer.refold()
        elif isinstance(layer, MixtureOfExperts) and isinstance(layer.together, GroupedExperts):
            layer.together.refold()


def _together(experts: Sequence[nn.Module]) -> "GroupedExperts | None":
    resnets = [expert for expert in experts if type(expert) is ResNet18]
    return GroupedExperts(resnets) if len(resnets) == len(experts) > 1 and _alike(resnets) else None


def _alike(experts: Sequence[ResNet18]) -> bool:
    """Whether they differ in nothing but weights, all of them in eval mode."""
    first, *others = experts
    alike = all(_shapes(other) == _shapes(first) and _sees_like(other, first) for other in others)
    return alike and not any(layer.training for layer in chain(*(expert.modules() for expert in experts)))


def _shapes(expert: ResNet18) -> list[torch.Size]:
    return [parameter.shape for parameter in expert.parameters()]


def _sees_like(expert: ResNet18, other: ResNet18) -> bool:
    left, right = expert.normalize, other.normalize
    return torch.equal(left.mean, right.mean) and torch.equal(left.std, right.std)


class GroupedExperts:
    """Pixels (B, C, H, W) -> logits (B, E, K) of ResNets that differ in nothing but their weights, frozen."""

    def __init__(self, experts: Sequence[ResNet18]) -> None:
        self.width = experts[0].stem.conv.out_channels
        self.normalize = experts[0].normalize
        self.stem = _Row([expert.stem for expert in experts])
        self.blocks = [_Block(blocks) for blocks in zip(*(expert.blocks for expert in experts), strict=True)]
        self.classify = [expert.classify for expert in experts]

    def pays(self, images_BCHW: Tensor) -> bool:
        """Whether this is faster than one expert after another."""
        dtype, (images, _, *sides) = compute_dtype(images_BCHW), images_BCHW.shape
        if images_BCHW.device.type == "cuda":
            return images * prod(sides) * self.width <= MAX_ACTIVATIONS_GPU
        if images_BCHW.device.type != "cpu" or self.width > MAX_WIDTH or dtype not in MAX_ACTIVATIONS:
            return False
        return images >= MIN_BATCH[dtype] and images * prod(sides) * self.width <= MAX_ACTIVATIONS[dtype]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        hidden = functional.relu(self.stem(self.normalize(images_BCHW)))
        for block in self.blocks:
            hidden = block(hidden)
        if hidden.dim() == 5:
            features_BEF = hidden.mean(dim=(2, 3)).transpose(0, 1)
        else:
            features_BEF = hidden.mean(dim=(2, 3)).reshape(len(images_BCHW), len(self.classify), -1)
        pairs = zip(self.classify, features_BEF.unbind(dim=1), strict=True)
        return torch.stack([linear_in_float32(layer, features_BF) for layer, features_BF in pairs], dim=1)

    def refold(self) -> None:
        """The experts' weights have changed."""
        for row in (self.stem, *chain(*(block.rows for block in self.blocks))):
            row.refold()


class _Block:
    """The same block of every expert."""

    def __init__(self, blocks: Sequence[BasicBlock]) -> None:
        self.first, self.second = _Row([block.first for block in blocks]), _Row([block.second for block in blocks])
        shortcuts = [block.shortcut for block in blocks if isinstance(block.shortcut, ConvNorm)]
        self.shortcut = _Row(shortcuts) if shortcuts else nn.Identity()
        self.rows = [row for row in (self.first, self.second, self.shortcut) if isinstance(row, _Row)]

    def __call__(self, hidden: Tensor) -> Tensor:
        return residual(hidden, self.first, self.second, self.shortcut)


class _Row:
    """The same layer of every expert, frozen: one convolution with a group of channels for each.

    Channels (B, C, H, W) that all layers read (the stem's pixels), or a group of channels for each. Small maps leave as
    (E, B, H, W, C), one expert's after another's, and are multiplied by a matrix of each expert from there on.
    """

    def __init__(self, layers: Sequence[ConvNorm]) -> None:
        self.layers, self.conv = layers, layers[0].conv
        self.folding = Folding(self.conv)

    def __call__(self, hidden: Tensor) -> Tensor:
        dtype = compute_dtype(hidden)
        if hidden.dim() == 5:
            return self.folding.multiplied(self._affine, hidden, dtype)
        weight, bias = self.folding.convolution(self._affine, dtype)
        groups = hidden.shape[1] // self.conv.in_channels
        maps = functional.conv2d(hidden, weight, bias, self.conv.stride, self.conv.padding, groups=groups)
        return self._apart(maps) if is_small(maps) else maps

    def refold(self) -> None:
        """The layers' weights have changed."""
        self.folding.renew(self._affine)

    def _apart(self, maps: Tensor) -> Tensor:
        batch, _, height, width = maps.shape
        each_BECHW = maps.view(batch, len(self.layers), -1, height, width)
        return each_BECHW.permute(1, 0, 3, 4, 2).contiguous()

    def _affine(self) -> list[Affine]:
        return [layer.affine() for layer in self.layers]

"""Runs the experts of a mixture as one network of grouped convolutions: the same logits, faster for small batches.

Every convolution of PyTorch selects its kernel anew, which takes about 0.1 ms; nine small experts in turn spend more on
that than on computing. One convolution with nine groups selects once, and small maps (`advmoe.models.folding`) are one
batched product of nine matrices. On a GPU kernel launches dominate even at full width: an H200 computes input gradients
of 128 images of 32 pixels in bfloat16 3 times as fast at width 16, 1.5 times at 64. Training steps are not grouped:
with gradients of the weights, groups gained nothing at the sizes that the pipeline trains at.

Shapes: B batch, C channel, H/W pixels, E experts, K classes, F features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.folding import FoldedConvCache, FoldedFilters, is_small_map
from advmoe.models.layers import ConvNorm, compute_dtype, linear_in_float32
from advmoe.models.mixture import MixtureOfExperts
from advmoe.models.resnet import BasicBlock, ResNet18, apply_basic_block

# Measured for forward pass and input gradient of nine experts of widths 4 to 64 on 8 to 32 pixels, on one thread of a
# CPU with AVX-512 and AMX: for wide groups or many images the computation dominates, and grouped it is slower.
MAX_WIDTH = 16  # on a CPU: channels of an expert's first stage; 24 and 32 gain with a few images only, 64 never
MAX_ACTIVATIONS = {
    torch.float32: 120_000,
    torch.bfloat16: 250_000,
}  # output values of one expert's first convolution
MAX_ACTIVATIONS_GPU = 10_000_000  # an H200 was faster from 65 thousand to 8 million, and a fifth slower at 34 million
MIN_BATCH = {
    torch.float32: 2,
    torch.bfloat16: 1,
}  # images; a single float32 image has a faster kernel without groups


@contextmanager
def group_experts(model: nn.Module) -> Iterator[None]:
    """Runs the experts of every mixture in `model` as grouped convolutions where that is possible and faster.

    Inside, the model must be in eval mode and its weights must not change.
    """
    # an enclosing `group_experts` has already grouped its mixtures and ungroups them
    mixtures = [layer for layer in model.modules() if type(layer) is MixtureOfExperts and layer.grouped_experts is None]
    for mixture in mixtures:
        mixture.grouped_experts = _group(list(mixture.experts))
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.grouped_experts = None


def refold_in_place(model: nn.Module) -> None:
    """Folds the current weights of a folded model again, grouped ones included, into the same memory."""
    for layer in model.modules():
        if isinstance(layer, ConvNorm):
            layer.refold()
        elif isinstance(layer, MixtureOfExperts) and isinstance(layer.grouped_experts, GroupedExperts):
            layer.grouped_experts.refold()


def _group(experts: Sequence[nn.Module]) -> "GroupedExperts | None":
    resnets = [expert for expert in experts if type(expert) is ResNet18]
    return GroupedExperts(resnets) if len(resnets) == len(experts) > 1 and _same_architecture(resnets) else None


def _same_architecture(experts: Sequence[ResNet18]) -> bool:
    """Returns whether the experts differ only in their weights and are in eval mode."""
    first, *others = experts
    same = all(
        _parameter_shapes(other) == _parameter_shapes(first) and _same_normalization(other, first) for other in others
    )
    return same and not any(layer.training for layer in chain(*(expert.modules() for expert in experts)))


def _parameter_shapes(expert: ResNet18) -> list[torch.Size]:
    return [parameter.shape for parameter in expert.parameters()]


def _same_normalization(expert: ResNet18, other: ResNet18) -> bool:
    left, right = expert.normalize, other.normalize
    return torch.equal(left.mean, right.mean) and torch.equal(left.std, right.std)


class GroupedExperts:
    """Pixels (B, C, H, W) -> logits (B, E, K) of frozen ResNets that differ only in their weights."""

    def __init__(self, experts: Sequence[ResNet18]) -> None:
        self.width = experts[0].stem.conv.out_channels
        self.normalize = experts[0].normalize
        self.stem = _GroupedConvNorm([expert.stem for expert in experts])
        self.blocks = [_GroupedBlock(blocks) for blocks in zip(*(expert.blocks for expert in experts), strict=True)]
        self.classify = [expert.classify for expert in experts]

    def is_faster(self, images_BCHW: Tensor) -> bool:
        """Returns whether this is faster than running the experts in turn."""
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
        """Folds the experts' current weights into the same memory."""
        for conv in (self.stem, *chain(*(block.convs for block in self.blocks))):
            conv.refold()


class _GroupedBlock:
    """The corresponding basic blocks of all experts."""

    def __init__(self, blocks: Sequence[BasicBlock]) -> None:
        self.first, self.second = (
            _GroupedConvNorm([block.first for block in blocks]),
            _GroupedConvNorm([block.second for block in blocks]),
        )
        shortcuts = [block.shortcut for block in blocks if isinstance(block.shortcut, ConvNorm)]
        self.shortcut = _GroupedConvNorm(shortcuts) if shortcuts else nn.Identity()
        self.convs = [conv for conv in (self.first, self.second, self.shortcut) if isinstance(conv, _GroupedConvNorm)]

    def __call__(self, hidden: Tensor) -> Tensor:
        return apply_basic_block(hidden, self.first, self.second, self.shortcut)


class _GroupedConvNorm:
    """The corresponding frozen ConvNorms of all experts as one grouped convolution.

    The input (B, C, H, W) is shared by all experts (the pixels at the stem) or has one group of channels per expert.
    Small maps are returned as (E, B, H, W, C) and from there on multiplied by one matrix per expert.
    """

    def __init__(self, layers: Sequence[ConvNorm]) -> None:
        self.layers, self.conv = layers, layers[0].conv
        self.conv_cache = FoldedConvCache(self.conv)

    def __call__(self, hidden: Tensor) -> Tensor:
        dtype = compute_dtype(hidden)
        if hidden.dim() == 5:
            return self.conv_cache.apply_matrix(self._folded_filters, hidden, dtype)
        weight, bias = self.conv_cache.conv_weights(self._folded_filters, dtype)
        groups = hidden.shape[1] // self.conv.in_channels
        maps = functional.conv2d(hidden, weight, bias, self.conv.stride, self.conv.padding, groups=groups)
        return self._split_by_expert(maps) if is_small_map(maps) else maps

    def refold(self) -> None:
        """Folds the layers' current weights into the same memory."""
        self.conv_cache.refold(self._folded_filters)

    def _split_by_expert(self, maps: Tensor) -> Tensor:
        batch, _, height, width = maps.shape
        maps_BECHW = maps.view(batch, len(self.layers), -1, height, width)
        return maps_BECHW.permute(1, 0, 3, 4, 2).contiguous()

    def _folded_filters(self) -> list[FoldedFilters]:
        return [layer.folded_filters() for layer in self.layers]

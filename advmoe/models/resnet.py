"""ResNet-18 for small images (He et al. 2016, in the form customary for 32-pixel images).

A 3x3 stem with stride 1 and no max-pool, four stages of two basic blocks with widths w, 2w, 4w, 8w. At width 64,
3 channels and 10 classes it has 11.2 million parameters.

Shapes: B batch, C channel, H/W pixels, K classes, F features (8w).
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.layers import ConvNorm, Normalize, initialise, linear_in_float32

STAGES = ((1, 1), (2, 2), (4, 2), (8, 2))  # (multiple of the width, stride of the first block)
BLOCKS_PER_STAGE = 2

Layer = Callable[[Tensor], Tensor]


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels_in, channels_out, 3, stride)
        self.second = ConvNorm(channels_out, channels_out, 3)
        same = stride == 1 and channels_in == channels_out
        self.shortcut: nn.Module = nn.Identity() if same else ConvNorm(channels_in, channels_out, 1, stride)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return apply_basic_block(images_BCHW, self.first, self.second, self.shortcut)


def apply_basic_block(images_BCHW: Tensor, first: Layer, second: Layer, shortcut: Layer) -> Tensor:
    """Applies the layers of a basic block: relu(second(relu(first(x))) + shortcut(x))."""
    inner = second(functional.relu(first(images_BCHW)))
    return functional.relu(inner + shortcut(images_BCHW))


class ResNet18(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> logits (B, K)."""

    def __init__(self, *, channels: int, classes: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = ConvNorm(channels, width, 3)
        blocks: list[nn.Module] = []
        channels_in = width
        for multiple, stride in STAGES:
            for position in range(BLOCKS_PER_STAGE):
                blocks.append(BasicBlock(channels_in, multiple * width, stride if position == 0 else 1))
                channels_in = multiple * width
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(channels_in, classes)
        initialise(self)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Returns the pooled features (B, F), the input of the last layer."""
        hidden = functional.relu(self.stem(self.normalize(images_BCHW)))
        pooled: Tensor = self.blocks(hidden).mean(dim=(2, 3))
        return pooled

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return linear_in_float32(self.classify, self.features(images_BCHW))

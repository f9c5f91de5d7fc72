"""ResNet-50 for small images (He et al. 2016, section 4.1 and table 1, in the form customary for 32-pixel images).

A 3x3 stem with stride 1 and no max-pool, four stages of 3, 4, 6 and 3 bottleneck blocks with inner widths w, 2w, 4w, 8w
and four times as many channels outside. At width 64, 3 channels and 10 classes it has 23.5 million parameters.

Shapes: B batch, C channel, H/W pixels, K classes, F features (32w).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.layers import ConvNorm, Normalize, initialise, linear_in_float32

STAGES = ((1, 1, 3), (2, 2, 4), (4, 2, 6), (8, 2, 3))  # (multiple of the width, stride of the first block, blocks)
EXPANSION = 4  # output channels of a block per inner channel


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions with `inner` channels inside and 4 * `inner` output channels.

    The stride is in the 3x3 convolution. In the 1x1 convolution before it, as first published, three of four pixels
    would be skipped.
    """

    def __init__(self, channels_in: int, inner: int, stride: int) -> None:
        super().__init__()
        channels_out = EXPANSION * inner
        self.reduce = ConvNorm(channels_in, inner, 1)
        self.middle = ConvNorm(inner, inner, 3, stride)
        self.expand = ConvNorm(inner, channels_out, 1)
        same = stride == 1 and channels_in == channels_out
        self.shortcut: nn.Module = nn.Identity() if same else ConvNorm(channels_in, channels_out, 1, stride)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        inner = functional.relu(self.reduce(images_BCHW))
        inner = self.expand(functional.relu(self.middle(inner)))
        return functional.relu(inner + self.shortcut(images_BCHW))


class ResNet50(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> logits (B, K)."""

    def __init__(self, *, channels: int, classes: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = ConvNorm(channels, width, 3)
        blocks: list[nn.Module] = []
        channels_in = width
        for multiple, stride, count in STAGES:
            for position in range(count):
                blocks.append(Bottleneck(channels_in, multiple * width, stride if position == 0 else 1))
                channels_in = EXPANSION * multiple * width
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

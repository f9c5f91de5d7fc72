"""WideResNet-28-10 without dropout (Zagoruyko & Komodakis 2016, table 1).

A 3x3 stem, three groups of four blocks, then BatchNorm, ReLU and the mean over pixels. `width` 64 is the full network:
16 channels in the stem, 160, 320 and 640 in the groups; 36.5 million parameters at 3 channels and 10 classes. Any other
width w scales all of them: w/4 channels in the stem (rounded down, at least 1), 2.5w (rounded down) in the first
group, then twice and four times as many as in the first.

Shapes: B batch, C channel, H/W pixels, K classes, F features (four times the first group's channels: 10w for even w).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.layers import Conv2d, ConvNorm, Normalize, initialise, linear_in_float32

GROUPS = ((1, 1), (2, 2), (4, 2))  # (multiple of the first group's channels, stride of the first block)
BLOCKS_PER_GROUP = 4  # depth 28: the stem, 3 groups of 4 blocks of 2, and 3 convolutions in shortcuts


class WideBlock(nn.Module):
    """Pre-activation residual block: BatchNorm, ReLU and 3x3 convolution, twice; no activation after the sum.

    The second norm directly follows a convolution, so the two fold. The first norm does not fold: its input is a sum
    that the shortcut also uses, and a ReLU separates it from the next convolution. (In the very first block it follows
    the stem, whose few channels are not worth a special case.)
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.first = ConvNorm(channels_in, channels_out, 3, stride)
        self.second = _plain_conv(channels_out, channels_out, 3)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = None if same else _plain_conv(channels_in, channels_out, 1, stride)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        active = functional.relu(self.norm(images_BCHW))
        inner: Tensor = self.second(functional.relu(self.first(active)))
        # where the shape changes, the shortcut also starts after the norm
        return inner + (images_BCHW if self.shortcut is None else self.shortcut(active))


class WideResNet28(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> logits (B, K)."""

    def __init__(self, *, channels: int, classes: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        channels_in, first_group = max(1, width // 4), 5 * width // 2
        self.stem = _plain_conv(channels, channels_in, 3)
        blocks: list[nn.Module] = []
        for multiple, stride in GROUPS:
            for position in range(BLOCKS_PER_GROUP):
                blocks.append(WideBlock(channels_in, multiple * first_group, stride if position == 0 else 1))
                channels_in = multiple * first_group
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels_in)
        self.classify = nn.Linear(channels_in, classes)
        initialise(self)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Returns the pooled features (B, F), the input of the last layer."""
        hidden = self.blocks(self.stem(self.normalize(images_BCHW)))
        return functional.relu(self.norm(hidden)).mean(dim=(2, 3))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return linear_in_float32(self.classify, self.features(images_BCHW))


def _plain_conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)

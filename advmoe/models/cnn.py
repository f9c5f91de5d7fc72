"""A small network of three convolutions, for example as the surrogate of an attacker with no knowledge of the victim.

Shapes: B batch, C channel, H/W pixels, K classes, F features (4w).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.layers import ConvNorm, Normalize, linear_in_float32


class SmallCnn(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> logits (B, K); widths w, 2w, 4w, the last two with stride 2."""

    def __init__(self, *, channels: int, classes: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.layers = nn.ModuleList(
            [
                ConvNorm(channels, width, 3),
                ConvNorm(width, 2 * width, 3, stride=2),
                ConvNorm(2 * width, 4 * width, 3, stride=2),
            ]
        )
        self.classify = nn.Linear(4 * width, classes)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Returns the pooled features (B, F), the input of the last layer."""
        hidden = self.normalize(images_BCHW)
        for layer in self.layers:
            hidden = functional.relu(layer(hidden))
        pooled: Tensor = hidden.mean(dim=(2, 3))
        return pooled

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return linear_in_float32(self.classify, self.features(images_BCHW))

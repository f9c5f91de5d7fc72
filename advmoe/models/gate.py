"""The gate: a small convolutional network that returns one weight per expert and image. All experts stay active.

Shapes: B batch, C channel, H/W pixels, E experts.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.layers import ConvNorm, Normalize, linear_in_float32


class Gate(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> log gate weights (B, E): log_softmax(scores / temperature).

    The last layer is initialised to zero: an untrained gate gives all experts equal weight, so joint training starts
    from the uniform average.
    """

    def __init__(
        self,
        *,
        channels: int,
        experts: int,
        width: int,
        temperature: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.normalize = Normalize(mean, std)
        self.layers = nn.ModuleList(
            [ConvNorm(channels, width, 3), ConvNorm(width, 2 * width, 3, 2), ConvNorm(2 * width, 4 * width, 3, 2)]
        )
        self.score = nn.Linear(4 * width, experts)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.normalize(images_BCHW)
        for layer in self.layers:
            hidden = functional.relu(layer(hidden))
        scores_BE = linear_in_float32(self.score, hidden.mean(dim=(2, 3)))
        return functional.log_softmax(scores_BE / self.temperature, dim=1)

"""How a gate distributes images over its experts: weights, and the numbers that sum them up.

Shapes: N images, C channel, H/W pixels, E experts.
"""

import torch
from torch import Tensor, nn

from advmoe.models import inference
from advmoe.models.mixture import MixtureOfExperts, expert_weights

BATCH = 200  # images of a forward pass


def gate_weights(mixture: MixtureOfExperts, images_NCHW: Tensor) -> Tensor:
    """What each expert's vote counts (N, E), in float32 and eval mode."""
    return expert_weights(inference.predict(_GateOf(mixture), images_NCHW, BATCH), mixture.mixing)


class _GateOf(nn.Module):
    """Pixels to log gate weights, whether a network of its own decides or the experts' own features."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.mixture.log_gate(images_BCHW)


def entropy(weights_NE: Tensor) -> Tensor:
    """Mean entropy of the gate's weights in nats: 0 when one expert has all, log E when all weigh alike."""
    nats: Tensor = -torch.special.xlogy(weights_NE, weights_NE).sum(dim=1).mean()
    return nats


def shift(left_NE: Tensor, right_NE: Tensor) -> Tensor:
    """Mean total variation distance between two sets of gate weights, in [0, 1]."""
    distance: Tensor = (left_NE - right_NE).abs().sum(dim=1).mean() / 2
    return distance

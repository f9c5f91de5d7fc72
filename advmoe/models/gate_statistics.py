"""Gate weights of a set of images, and statistics of them: entropy and total variation distance.

Shapes: N images, C channel, H/W pixels, E experts.
"""

import torch
from torch import Tensor, nn

from advmoe.models import inference
from advmoe.models.mixture import MixtureOfExperts, expert_weights

BATCH_SIZE = 200  # images per forward pass


def gate_weights(mixture: MixtureOfExperts, images_NCHW: Tensor) -> Tensor:
    """Returns the weight of each expert (N, E), in float32 and eval mode."""
    return expert_weights(inference.predict(_LogGate(mixture), images_NCHW, BATCH_SIZE), mixture.mixing)


class _LogGate(nn.Module):
    """Pixels (B, C, H, W) -> log gate weights (B, E), from the gate network or from the experts' features."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.mixture.log_gate(images_BCHW)


def entropy(weights_NE: Tensor) -> Tensor:
    """Returns the mean entropy of the gate weights in nats: 0 if one expert has all the weight, log E if uniform."""
    nats: Tensor = -torch.special.xlogy(weights_NE, weights_NE).sum(dim=1).mean()
    return nats


def total_variation(left_NE: Tensor, right_NE: Tensor) -> Tensor:
    """Returns the mean total variation distance between two sets of gate weights, in [0, 1]."""
    distance: Tensor = (left_NE - right_NE).abs().sum(dim=1).mean() / 2
    return distance

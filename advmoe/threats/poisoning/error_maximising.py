"""Adversarial poison: images that a trained network takes for the next class, under their own label (Fowl et al. 2021,
"Adversarial examples make strong poisons", arXiv 2106.10807, the targeted variant).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.threats.poisoning.perturbation import Noise, noisy, towards
from advmoe.threats.poisoning.poisoned_set import Poisoned


class ErrorMaximising(Noise):
    """All steps go towards class y + 1 mod K on the `proxy`, a baseline's twin
    trained under a seed of its own. The rate is a share of the set.
    """

    kind: Literal["error-maximising"]
    proxy: str


def error_maximising(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    settings: ErrorMaximising,
    *,
    rate: float,
    classes: int,
    proxy: nn.Module,
) -> Poisoned:
    """Every chosen image moved towards the next class, labels true."""

    def make(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        return towards(proxy, images, points, (labels + 1) % classes, settings)

    return noisy(images_NCHW, labels_N, stream, rate, settings.epsilon, make)

"""Error-maximising poison: images perturbed towards the next class, with their own label (Fowl et al. 2021,
"Adversarial examples make strong poisons", arXiv 2106.10807, the targeted variant).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.threats.poisoning.perturbation import PerturbationSettings, perturb_images, perturb_towards_labels
from advmoe.threats.poisoning.poisoned_set import PoisonedSet


class ErrorMaximising(PerturbationSettings):
    """The steps go towards class y + 1 mod K of the `proxy`, a network trained with that baseline's recipe and a
    separate seed. The rate is a share of the set.
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
) -> PoisonedSet:
    """Perturbs the images towards the next class; labels are unchanged."""

    def craft(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        return perturb_towards_labels(proxy, images, points, (labels + 1) % classes, settings)

    return perturb_images(images_NCHW, labels_N, stream, rate, settings.epsilon, craft)

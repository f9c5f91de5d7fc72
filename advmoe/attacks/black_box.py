"""Shared by attacks without gradients: tracks the best point of each image and which images are still under attack.

Shapes: B batch, b images still under attack, C channel, H/W pixels, K classes.
"""

import torch
from torch import Tensor

from advmoe.attacks.interface import IsAdversarial, Model, confirm_adversarial, margin


class BestPoints:
    """The point of highest margin of each image of a batch, and the indices `active` (b,) of images still attacked."""

    def __init__(
        self, model: Model, images_BCHW: Tensor, labels_B: Tensor, is_adversarial: IsAdversarial | None
    ) -> None:
        self.model, self.labels, self.is_adversarial = model, labels_B, is_adversarial
        self.points = images_BCHW.clone()
        self.losses = torch.full((len(images_BCHW),), -torch.inf, device=images_BCHW.device)
        self.active = torch.arange(len(images_BCHW), device=images_BCHW.device)

    def query(self, points_bCHW: Tensor) -> None:
        """Queries the model once per active image: keeps points of higher margin, removes adversarial images."""
        rows, labels = self.active, self.labels[self.active]
        logits = self.model(points_bCHW)
        losses = margin(logits, labels).to(self.losses)
        better = losses > self.losses[rows]
        self.points[rows[better]] = points_bCHW[better]
        self.losses[rows[better]] = losses[better]
        # points that are misclassified but no better than one rejected before are not checked again
        adversarial = confirm_adversarial(
            better & (logits.argmax(dim=1) != labels), points_bCHW, labels, self.is_adversarial
        )
        self.active = rows[~adversarial]

"""What attacks without gradients share: guesses are scored, the best of each image is kept, success is confirmed.

Shapes: B batch, b images still open, C channel, H/W pixels, K classes.
"""

import torch
from torch import Tensor

from advmoe.attacks.interface import IsAdversarial, Model, confirmed, margin


class BestPoints:
    """The point of highest margin known of each image of a batch, and the numbers (b,) of the images still open."""

    def __init__(self, model: Model, images_BCHW: Tensor, labels_B: Tensor, fooled: IsAdversarial | None) -> None:
        self.model, self.labels, self.fooled = model, labels_B, fooled
        self.points = images_BCHW.clone()
        self.losses = torch.full((len(images_BCHW),), -torch.inf, device=images_BCHW.device)
        self.open = torch.arange(len(images_BCHW), device=images_BCHW.device)

    def offer(self, guesses_bCHW: Tensor) -> None:
        """Spend one query on each open image: a better guess is kept, and closes its image where it is confirmed."""
        rows, labels = self.open, self.labels[self.open]
        logits = self.model(guesses_bCHW)
        losses = margin(logits, labels).to(self.losses)
        better = losses > self.losses[rows]
        self.points[rows[better]] = guesses_bCHW[better]
        self.losses[rows[better]] = losses[better]
        # a guess that is wrong but no better than one denied before is not worth the question
        fallen = confirmed(better & (logits.argmax(dim=1) != labels), guesses_bCHW, labels, self.fooled)
        self.open = rows[~fallen]

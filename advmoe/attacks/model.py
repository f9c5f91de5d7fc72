"""The form all attacks share.

An attack is `attack(model, images_BCHW, labels_B, *, ball, settings, draws) -> images_BCHW`: pixels in [0, 1], a model
that returns logits, a result inside the ball. It reads nothing else and changes nothing, the model's mode included.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Model = Callable[[Tensor], Tensor]
Fooled = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["ce", "margin"]


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy of each image (B,)."""
    return functional.cross_entropy(logits_BK, labels_B, reduction="none")


def margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Best wrong logit minus the true one (B,): above 0 where the image is misclassified (Carlini-Wagner 2017)."""
    true = logits_BK.gather(1, labels_B[:, None]).squeeze(1)
    others = logits_BK.scatter(1, labels_B[:, None], -torch.inf).amax(dim=1)
    return others - true


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin}


def input_gradient(model: Model, images_BCHW: Tensor, labels_B: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss with respect to the pixels (B, C, H, W), and the logits (B, K) on the way."""
    with torch.enable_grad():
        pixels = images_BCHW.detach().requires_grad_(True)
        logits_BK = model(pixels)
        (gradient,) = torch.autograd.grad(LOSSES[loss](logits_BK, labels_B).sum(), pixels)
    return gradient, logits_BK.detach()

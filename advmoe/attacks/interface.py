"""The form all attacks share.

An attack is `attack(model, images_BCHW, labels_B, *, ball, settings, draws, fooled) -> images_BCHW`: pixels in [0, 1],
a model that returns logits, a result inside the ball. It reads nothing else and changes nothing, the model's mode
included. `fooled(points, labels)` is the caller's own verdict, (b,) bool: with it an image may leave the attack at the
first point it confirms, and that point is returned. Without it FGSM and PGD take every image all the way, as training
wants; the others go by the model's own decision.

Shapes: B batch, b images still under attack, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import Ball, Draws

Model = Callable[[Tensor], Tensor]
IsAdversarial = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["ce", "margin"]


class AttackFn(Protocol):
    """An attack whose settings are bound, as harness and training call it; also the form of a user's own attack."""

    def __call__(
        self,
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        /,
        *,
        ball: Ball,
        draws: Draws,
        fooled: IsAdversarial | None = None,
    ) -> Tensor:
        """Adversarial images (B, C, H, W)."""
        ...


def confirmed(suspect_b: Tensor, points_bCHW: Tensor, labels_b: Tensor, fooled: IsAdversarial | None) -> Tensor:
    """Which of the suspect points count as adversarial, (b,) bool: those that `fooled` confirms, all without it."""
    if fooled is None or not suspect_b.any():
        return suspect_b
    fallen_b = suspect_b.clone()
    fallen_b[suspect_b] = fooled(points_bCHW[suspect_b], labels_b[suspect_b])
    return fallen_b


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy of each image (B,)."""
    return functional.cross_entropy(logits_BK, labels_B, reduction="none")


def margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Best wrong logit minus the true one (B,): above 0 where the image is misclassified (Carlini-Wagner 2017)."""
    true = logits_BK.gather(1, labels_B[:, None]).squeeze(1)
    others = logits_BK.scatter(1, labels_B[:, None], -torch.inf).amax(dim=1)
    return others - true


def lead(logits_BK: Tensor, labels_B: Tensor, targets_B: Tensor) -> Tensor:
    """Logit of the target minus the true one (B,), Carlini-Wagner's 2017 difference of a targeted attack."""
    return (logits_BK.gather(1, targets_B[:, None]) - logits_BK.gather(1, labels_B[:, None])).squeeze(1)


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin}


def input_gradient(model: Model, images_BCHW: Tensor, labels_B: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss with respect to the pixels (B, C, H, W), and the logits (B, K) on the way."""
    return pixel_gradient(model, images_BCHW, lambda logits_BK: LOSSES[loss](logits_BK, labels_B))


def pixel_gradient(model: Model, images_BCHW: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The same for any `loss` of the model's output, (B,) numbers that each depend on their own image only."""
    with torch.enable_grad():
        pixels = images_BCHW.detach().requires_grad_(True)
        logits_BK = model(pixels)
        total = loss(logits_BK).sum()
        # a model that cuts its graph has no gradient: attacks then stand still, and the checks say why
        found = torch.autograd.grad(total, pixels, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(images_BCHW) if found is None else found, logits_BK.detach()

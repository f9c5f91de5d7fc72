"""The interface of attacks, and the losses and gradients they share.

An attack is a pure function
`attack(model, images_BCHW, labels_B, *, ball, settings, draws, is_adversarial) -> images_BCHW`:
pixels in [0, 1], a model that returns logits, a result inside the ball. It changes neither its arguments nor the model,
its mode included. `is_adversarial(points, labels)`, (b,) bool, is the caller's check: with it an image may leave the
attack at the first confirmed point, which is returned. Without it FGSM and PGD run all steps on every image, as
training needs; the other attacks use the model's own predictions.

Shapes: B batch, b images still under attack, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import Ball, RandomStream

Model = Callable[[Tensor], Tensor]
IsAdversarial = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["ce", "margin"]


class AttackFn(Protocol):
    """An attack with its settings bound, as evaluation and training call it; also the form of custom attacks."""

    def __call__(
        self,
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        /,
        *,
        ball: Ball,
        draws: RandomStream,
        is_adversarial: IsAdversarial | None = None,
    ) -> Tensor:
        """Returns adversarial images (B, C, H, W)."""
        ...


def confirm_adversarial(
    candidates_b: Tensor, points_bCHW: Tensor, labels_b: Tensor, is_adversarial: IsAdversarial | None
) -> Tensor:
    """Returns the candidates that `is_adversarial` confirms, (b,) bool; all candidates if it is None."""
    if is_adversarial is None or not candidates_b.any():
        return candidates_b
    confirmed_b = candidates_b.clone()
    confirmed_b[candidates_b] = is_adversarial(points_bCHW[candidates_b], labels_b[candidates_b])
    return confirmed_b


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the cross-entropy of each image (B,)."""
    return functional.cross_entropy(logits_BK, labels_B, reduction="none")


def margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the largest wrong logit minus the true one (B,): above 0 where misclassified (Carlini & Wagner 2017)."""
    true = logits_BK.gather(1, labels_B[:, None]).squeeze(1)
    others = logits_BK.scatter(1, labels_B[:, None], -torch.inf).amax(dim=1)
    return others - true


def target_margin(logits_BK: Tensor, labels_B: Tensor, targets_B: Tensor) -> Tensor:
    """Returns the logit of the target minus the true one (B,), the targeted loss of Carlini & Wagner 2017."""
    return (logits_BK.gather(1, targets_B[:, None]) - logits_BK.gather(1, labels_B[:, None])).squeeze(1)


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin}


def input_gradient(model: Model, images_BCHW: Tensor, labels_B: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the summed loss with respect to the pixels (B, C, H, W), and the logits (B, K)."""
    return pixel_gradient(model, images_BCHW, lambda logits_BK: LOSSES[loss](logits_BK, labels_B))


def pixel_gradient(model: Model, images_BCHW: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Like `input_gradient` for any `loss` of the logits, (B, K) -> (B,), that depends on each image separately."""
    with torch.enable_grad():
        pixels = images_BCHW.detach().requires_grad_(True)
        logits_BK = model(pixels)
        total = loss(logits_BK).sum()
        # a non-differentiable model has no gradient: attacks then do not move, which the robustness checks report
        gradient = torch.autograd.grad(total, pixels, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(images_BCHW) if gradient is None else gradient, logits_BK.detach()

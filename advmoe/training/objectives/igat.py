"""Images that fool the whole are dealt out to the experts that nearly stand (after iGAT, Deng and Mu, NeurIPS 2023,
arXiv 2310.18477).

    loss = -log p_y(x') + [the answer to x' is wrong] * (alpha * dealt + beta * worst)
    dealt = sum_e r_e CE_e(x'), with r_e = softmax over experts of p_ey(x')
    worst = -log(1 - max_e max_{k != y} p_ek(x'))

The paper draws one expert for each image from r; here the expectation is taken, which many draws come to and which
needs no random numbers. The last term holds down the one expert that is surest of a wrong class.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.params import NonNegativeFloat, Settings

SUREST = 1 - 1e-6  # a probability of 1 would make the last term infinite


class Igat(Settings):
    """`alpha`: weight of what is dealt out; `beta`: of the worst expert's error."""

    kind: Literal["igat"]
    alpha: NonNegativeFloat
    beta: NonNegativeFloat


def igat_loss(log_probs_BK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: Igat) -> Tensor:
    """The loss, a mean over the batch."""
    fooled_B = log_probs_BK.argmax(dim=1) != labels_B
    probs_BEK = functional.softmax(logits_BEK, dim=2)
    index_BE1 = labels_B[:, None, None].expand(-1, logits_BEK.shape[1], 1)
    right_BE = probs_BEK.gather(2, index_BE1).squeeze(2)
    own_BE = -functional.log_softmax(logits_BEK, dim=2).gather(2, index_BE1).squeeze(2)
    dealt_B = (functional.softmax(right_BE.detach(), dim=1) * own_BE).sum(dim=1)
    surest_B = probs_BEK.scatter(2, index_BE1, 0.0).flatten(1).amax(dim=1).clamp_max(SUREST)
    hard_B = settings.alpha * dealt_B - settings.beta * torch.log1p(-surest_B)
    return functional.nll_loss(log_probs_BK, labels_B) + (fooled_B * hard_B).mean()

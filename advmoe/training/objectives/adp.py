"""ADP: experts that disagree about what an image is not (Pang et al., ICML 2019, arXiv 1901.08846).

    loss = sum_e CE_e(x') - alpha * H(p(x')) - beta * log det(M M^T)

H: entropy (nats) of the mixture's answer; row e of M: expert e's probabilities of the wrong classes, as a vector of
length 1. The determinant is the squared volume that these span, 0 where two experts give the wrong classes the same
proportions. The cross-entropies are those of the experts, each asked alone: beside one of the answer alpha and beta
would weigh as many times too much as there are experts.

Shapes: B batch, E experts, K classes, W wrong classes (K - 1).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.errors import UserError
from advmoe.params import NonNegativeFloat, Settings
from advmoe.training.objectives.votes import own_losses

JITTER = 1e-6  # on the diagonal: experts that agree to the last bit leave a finite loss


class Adp(Settings):
    """`alpha` and `beta` weigh entropy and volume; the paper takes 2 and 0.5."""

    kind: Literal["adp"]
    alpha: NonNegativeFloat
    beta: NonNegativeFloat


def adp_loss(log_probs_BK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: Adp) -> Tensor:
    """The loss, a mean over the batch. Raises UserError for more experts than wrong classes: they span no volume."""
    _, experts, classes = logits_BEK.shape
    if experts >= classes:
        raise UserError(f"train.recipe: adp sets at most {classes - 1} experts apart for {classes} classes")
    entropy_B = -(log_probs_BK.exp() * log_probs_BK).sum(dim=1)
    diverse_B = settings.alpha * entropy_B + settings.beta * log_volume(logits_BEK, labels_B)
    return experts * own_losses(logits_BEK, labels_B) - diverse_B.mean()


def log_volume(logits_BEK: Tensor, labels_B: Tensor) -> Tensor:
    """The logarithm of the determinant, of each image (B,)."""
    experts, classes = logits_BEK.shape[1:]
    wrong_BK = functional.one_hot(labels_B, classes) == 0
    wrong_BEW = logits_BEK[wrong_BK[:, None].expand_as(logits_BEK)].view(-1, experts, classes - 1)
    rows_BEW = functional.normalize(functional.softmax(wrong_BEW.float(), dim=2), dim=2)  # softmax: equal up to length
    gram_BEE = (rows_BEW[:, :, None] * rows_BEW[:, None]).sum(dim=3)  # no matmul: autocast would round it to bfloat16
    identity_EE = torch.eye(experts, device=gram_BEE.device)
    volume_B: Tensor = torch.linalg.slogdet(gram_BEE + JITTER * identity_EE).logabsdet
    return volume_B

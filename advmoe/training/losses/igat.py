"""Images that fool the whole are dealt out to the experts that nearly stand (after iGAT, Deng and Mu, NeurIPS 2023,
arXiv 2310.18477).

    loss  = -log p_y(x') + [the answer to x' is wrong] * (alpha * dealt + beta * worst)
    dealt = sum_e r_e CE_e(x'), r_e = 2^rank / (2^E - 1), the rank of p_ey(x') among the experts, 0 for the lowest
    worst = -log(1 - max_e max_{k != y} p_ek(x'))

The authors' program (github.com/xqsi/iGAT) draws one expert for each image by these ranks, half of the time the best;
here the expectation is taken, which many draws come to and which needs no random numbers. The last term holds down the
one expert that is surest of a wrong class; theirs sums over all experts unless told otherwise, doubles that of the
surest, and has no slope above a probability of 0.99. Their alpha and beta, 5 and 10, stand beside the cross-entropies
of eight experts; 0.6 and 1.25, an eighth of them, are our choice beside the one of the answer.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import NonNegativeFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import log_prob_of_class, per_expert_batch, without_surest_wrong


class Igat(Settings):
    """`alpha`: weight of what is dealt out; `beta`: of the worst expert's error."""

    kind: Literal["igat"]
    alpha: NonNegativeFloat
    beta: NonNegativeFloat

    def loss(self, batch: Batch) -> Tensor:
        """The answer and the experts, as below."""
        return igat_loss(batch.attacked.log_probs_BK, batch.attacked.logits_BEK, batch.labels_B, self)


def igat_loss(log_probs_BK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: Igat) -> Tensor:
    """The loss, a mean over the batch."""
    experts = logits_BEK.shape[1]
    votes_NK, labels_N = per_expert_batch(logits_BEK, labels_B)
    right_BE = log_prob_of_class(votes_NK, labels_N).view(-1, experts)
    dealt_B = (shares(right_BE.detach()) * -right_BE).sum(dim=1)
    worst_B = -without_surest_wrong(votes_NK, labels_N).view(-1, experts).amin(dim=1)
    fooled_B = log_probs_BK.argmax(dim=1) != labels_B
    hard_B = settings.alpha * dealt_B + settings.beta * worst_B
    return functional.nll_loss(log_probs_BK, labels_B) + (fooled_B * hard_B).mean()


def shares(right_BE: Tensor) -> Tensor:
    """What each expert gets of an image (B, E): with each rank twice as much, 1 in all."""
    rank_BE = right_BE.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.exp2(rank_BE.to(right_BE)) / float(2 ** right_BE.shape[1] - 1)

"""iGAT: misclassified images are assigned to the experts that are most nearly right (after Deng and Mu, NeurIPS 2023,
arXiv 2310.18477).

    loss        = -log p_y(x') + [x' is misclassified] * (alpha * distributed + beta * worst)
    distributed = sum_e r_e CE_e(x'), r_e = 2^rank / (2^E - 1), the rank of p_ey(x') among the experts, 0 for the lowest
    worst       = -log(1 - max_e max_{k != y} p_ek(x'))

The authors' program (github.com/xqsi/iGAT) draws one expert for each image by these ranks, half of the time the best;
here the expectation is taken, which needs no random numbers. The last term penalises the one expert with the highest
probability of a wrong class; theirs by default sums over all experts, doubles the highest, and has no gradient above a
probability of 0.99. Their alpha and beta, 5 and 10, are added to the cross-entropies of eight experts; 0.6 and 1.25, an
eighth of them, are our choice for the single cross-entropy of the mixture.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import NonNegativeFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import flatten_experts, log_one_minus_top_wrong_prob, log_prob_of_class


class Igat(Settings):
    """`alpha`: weight of the distributed term; `beta`: weight of the worst expert's error."""

    kind: Literal["igat"]
    alpha: NonNegativeFloat
    beta: NonNegativeFloat

    def loss(self, batch: Batch) -> Tensor:
        """Returns `igat_loss` of the mixture's output on the attacked images."""
        return igat_loss(batch.attacked.log_probs_BK, batch.attacked.logits_BEK, batch.labels_B, self)


def igat_loss(log_probs_BK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: Igat) -> Tensor:
    """Returns the loss, a mean over the batch."""
    experts = logits_BEK.shape[1]
    expert_log_probs_NK, labels_N = flatten_experts(logits_BEK, labels_B)
    true_log_prob_BE = log_prob_of_class(expert_log_probs_NK, labels_N).view(-1, experts)
    distributed_B = (rank_weights(true_log_prob_BE.detach()) * -true_log_prob_BE).sum(dim=1)
    worst_B = -log_one_minus_top_wrong_prob(expert_log_probs_NK, labels_N).view(-1, experts).amin(dim=1)
    misclassified_B = log_probs_BK.argmax(dim=1) != labels_B
    hard_B = settings.alpha * distributed_B + settings.beta * worst_B
    return functional.nll_loss(log_probs_BK, labels_B) + (misclassified_B * hard_B).mean()


def rank_weights(true_log_prob_BE: Tensor) -> Tensor:
    """Returns the weight of each expert on an image (B, E): doubled with each rank, 1 in total."""
    rank_BE = true_log_prob_BE.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.exp2(rank_BE.to(true_log_prob_BE)) / float(2 ** true_log_prob_BE.shape[1] - 1)

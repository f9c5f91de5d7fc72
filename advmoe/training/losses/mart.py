"""MART: images that are misclassified without an attack count more (Wang et al., ICLR 2020).

    loss = BCE(p(x'), y) + weight * KL(p(x) || p(x')) * (1 - p_y(x))
    BCE  = -log p_y(x') - log(1 - max_{k != y} p_k(x'))

with x the image and x' the attacked one. The first term also lowers the most likely wrong class; the second has
little weight on images that are classified with confidence.

Shapes: B batch, K classes.
"""

from typing import Literal

from torch import Tensor

from advmoe.core.settings import PositiveFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import log_one_minus_top_wrong_prob, log_prob_of_class
from advmoe.training.trades import kl_divergence


class Mart(Settings):
    """`weight` of the second term; the paper's lambda is 5."""

    kind: Literal["mart"]
    weight: PositiveFloat

    def loss(self, batch: Batch) -> Tensor:
        """Returns `mart_loss` of the mixture's output on clean and on attacked images."""
        return mart_loss(batch.clean().log_probs_BK, batch.attacked.log_probs_BK, batch.labels_B, self.weight)


def mart_loss(clean_BK: Tensor, attacked_BK: Tensor, labels_B: Tensor, weight: float) -> Tensor:
    """Returns the loss from log-probabilities, a mean over the batch."""
    uncertainty_B = 1 - log_prob_of_class(clean_BK, labels_B).exp()
    return (
        boosted_cross_entropy(attacked_BK, labels_B) + weight * kl_divergence(clean_BK, attacked_BK) * uncertainty_B
    ).mean()


def boosted_cross_entropy(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns BCE of each image (B,)."""
    return -log_prob_of_class(log_probs_BK, labels_B) - log_one_minus_top_wrong_prob(log_probs_BK, labels_B)

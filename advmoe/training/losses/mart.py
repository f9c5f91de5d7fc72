"""MART: images that are wrong without an attack count more (Wang et al., ICLR 2020).

    loss = BCE(p(x'), y) + weight * KL(p(x) || p(x')) * (1 - p_y(x))
    BCE  = -log p_y(x') - log(1 - max_{k != y} p_k(x'))

with x the image and x' the attacked one. The first term also pushes the strongest wrong class down, the second lets an
image that is sure of its class alone.

Shapes: B batch, K classes.
"""

from typing import Literal

from torch import Tensor

from advmoe.core.settings import PositiveFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import log_prob_of_class, without_surest_wrong
from advmoe.training.trades import divergence


class Mart(Settings):
    """`weight` of the second term; the paper's lambda is 5."""

    kind: Literal["mart"]
    weight: PositiveFloat

    def loss(self, batch: Batch) -> Tensor:
        """The answers to clean and to attacked images, as below."""
        return mart_loss(batch.clean().log_probs_BK, batch.attacked.log_probs_BK, batch.labels_B, self.weight)


def mart_loss(clean_BK: Tensor, attacked_BK: Tensor, labels_B: Tensor, weight: float) -> Tensor:
    """The loss from log-probabilities, a mean over the batch."""
    unsure_B = 1 - log_prob_of_class(clean_BK, labels_B).exp()
    return (boosted(attacked_BK, labels_B) + weight * divergence(clean_BK, attacked_BK) * unsure_B).mean()


def boosted(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """BCE of each image (B,)."""
    return -log_prob_of_class(log_probs_BK, labels_B) - without_surest_wrong(log_probs_BK, labels_B)

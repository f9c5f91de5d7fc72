"""MART for each expert, and ADP's diversity between them (see `mart` and `adp`; the combination is ours).

    loss = sum_e MART_e(x, x') - alpha * H(mean_e p_e(x')) - beta * log det(M M^T)

MART takes the place of ADP's cross-entropies as the loss of each expert. The gate is trained as with ADP.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

from torch import Tensor

from advmoe.core.settings import PositiveFloat
from advmoe.training.losses.adp import Diversity, diversity
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import flatten_experts
from advmoe.training.losses.mart import mart_loss


class MartAdp(Diversity):
    """`alpha` and `beta` as in ADP, `weight` as in MART."""

    kind: Literal["mart-adp"]
    weight: PositiveFloat

    def loss(self, batch: Batch) -> Tensor:
        """Returns the loss of the experts plus that of the gate."""
        clean_BEK = batch.clean().logits_BEK
        return mart_adp_loss(clean_BEK, batch.attacked.logits_BEK, batch.labels_B, self) + batch.routing_loss()


def mart_adp_loss(clean_BEK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: MartAdp) -> Tensor:
    """Returns the loss from the experts' logits for the clean and for the attacked images, a mean over the batch.
    Raises UserError for more experts than wrong classes.
    """
    clean_log_probs_NK, _ = flatten_experts(clean_BEK, labels_B)
    log_probs_NK, labels_N = flatten_experts(logits_BEK, labels_B)
    loss = logits_BEK.shape[1] * mart_loss(clean_log_probs_NK, log_probs_NK, labels_N, settings.weight)
    return loss - diversity(logits_BEK, labels_B, settings)

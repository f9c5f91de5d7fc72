"""MART for each expert, and ADP's diversity between them (see `mart` and `adp`; the combination is ours).

    loss = sum_e MART_e(x, x') - alpha * H(mean_e p_e(x')) - beta * log det(M M^T)

ADP keeps experts apart and leaves open what each of them learns; MART says it, in place of the cross-entropies. The
gate learns as with ADP.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

from torch import Tensor

from advmoe.core.settings import PositiveFloat
from advmoe.training.losses.adp import Diversity, diversity
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import per_expert_batch
from advmoe.training.losses.mart import mart_loss


class MartAdp(Diversity):
    """`alpha` and `beta` as of ADP, `weight` as of MART."""

    kind: Literal["mart-adp"]
    weight: PositiveFloat

    def loss(self, batch: Batch) -> Tensor:
        """That of the experts, and the gate's own."""
        clean_BEK = batch.clean().logits_BEK
        return mart_adp_loss(clean_BEK, batch.attacked.logits_BEK, batch.labels_B, self) + batch.routing_loss()


def mart_adp_loss(clean_BEK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: MartAdp) -> Tensor:
    """The loss from the experts' logits for the clean and for the attacked images, a mean over the batch. Raises
    UserError for more experts than wrong classes.
    """
    clean_NK, _ = per_expert_batch(clean_BEK, labels_B)
    votes_NK, labels_N = per_expert_batch(logits_BEK, labels_B)
    lost = logits_BEK.shape[1] * mart_loss(clean_NK, votes_NK, labels_N, settings.weight)
    return lost - diversity(logits_BEK, labels_B, settings)

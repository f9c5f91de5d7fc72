"""ADP: experts that differ in their probabilities of the wrong classes (Pang et al., ICML 2019, arXiv 1901.08846).

    loss = sum_e CE_e(x') - alpha * H(mean_e p_e(x')) - beta * log det(M M^T)

H: entropy (nats); row e of M: expert e's probabilities of the wrong classes, as a vector of length 1. The determinant
is the squared volume that these span, 0 where two experts give the wrong classes the same proportions. The
cross-entropies are those of the experts' own outputs: relative to the single one of the mixture's output alpha and beta
would be too large by a factor of the number of experts.

As in the authors' ensemble the entropy is that of a plain average: that of a gated output would train the gate to
prefer the most uncertain experts. The gate is trained by the cross-entropy of the mixture's output with detached
experts.

Shapes: B batch, E experts, K classes, W wrong classes (K - 1).
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.core.settings import NonNegativeFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.expert_losses import expert_cross_entropy

JITTER = 1e-6  # on the diagonal: keeps the loss finite where experts agree exactly


class Diversity(Settings):
    """`alpha`: weight of the entropy; `beta`: of the log volume; the paper uses 2 and 0.5."""

    alpha: NonNegativeFloat
    beta: NonNegativeFloat


class Adp(Diversity):
    """The settings of ADP."""

    kind: Literal["adp"]

    def loss(self, batch: Batch) -> Tensor:
        """Returns the loss of the experts plus that of the gate."""
        return adp_loss(batch.attacked.logits_BEK, batch.labels_B, self) + batch.routing_loss()


def adp_loss(logits_BEK: Tensor, labels_B: Tensor, settings: Adp) -> Tensor:
    """Returns the loss, a mean over the batch. Raises UserError as `diversity` does."""
    return logits_BEK.shape[1] * expert_cross_entropy(logits_BEK, labels_B) - diversity(logits_BEK, labels_B, settings)


def diversity(logits_BEK: Tensor, labels_B: Tensor, settings: Diversity) -> Tensor:
    """Returns the diversity, a mean over the batch. Raises UserError for more experts than wrong classes, whose vectors
    are linearly dependent.
    """
    _, experts, classes = logits_BEK.shape
    if experts >= classes:
        raise UserError(
            f"train.recipe: the diversity of ADP allows at most {classes - 1} experts for {classes} classes"
        )
    average_BK = torch.logsumexp(functional.log_softmax(logits_BEK, dim=2), dim=1) - math.log(experts)
    entropy_B = -(average_BK.exp() * average_BK).sum(dim=1)
    return (settings.alpha * entropy_B + settings.beta * log_volume(logits_BEK, labels_B)).mean()


def log_volume(logits_BEK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the logarithm of the determinant of each image (B,)."""
    experts, classes = logits_BEK.shape[1:]
    wrong_BK = functional.one_hot(labels_B, classes) == 0
    wrong_BEW = logits_BEK[wrong_BK[:, None].expand_as(logits_BEK)].view(-1, experts, classes - 1)
    rows_BEW = functional.normalize(functional.softmax(wrong_BEW.float(), dim=2), dim=2)  # softmax: equal up to length
    gram_BEE = (rows_BEW[:, :, None] * rows_BEW[:, None]).sum(dim=3)  # no matmul: autocast would round it to bfloat16
    identity_EE = torch.eye(experts, device=gram_BEE.device)
    volume_B: Tensor = torch.linalg.slogdet(gram_BEE + JITTER * identity_EE).logabsdet
    return volume_B

"""ADP: experts that disagree about what an image is not (Pang et al., ICML 2019, arXiv 1901.08846).

    loss = sum_e CE_e(x') - alpha * H(mean_e p_e(x')) - beta * log det(M M^T)

H: entropy (nats); row e of M: expert e's probabilities of the wrong classes, as a vector of length 1. The determinant
is the squared volume that these span, 0 where two experts give the wrong classes the same proportions. The
cross-entropies are those of the experts, each asked alone: beside one of the answer alpha and beta would weigh as many
times too much as there are experts.

The authors' ensemble is a plain average, and so it is here: of a gate's answer the entropy would teach the gate to
trust the experts that know least, and nothing else would teach it anything. The gate learns from the answer with the
experts held still.

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
from advmoe.training.losses.expert_losses import own_losses

JITTER = 1e-6  # on the diagonal: experts that agree to the last bit leave a finite loss


class Diversity(Settings):
    """`alpha` and `beta` weigh entropy and volume; the paper takes 2 and 0.5."""

    alpha: NonNegativeFloat
    beta: NonNegativeFloat


class Adp(Diversity):
    """ADP itself."""

    kind: Literal["adp"]

    def loss(self, batch: Batch) -> Tensor:
        """That of the experts, and the gate's own."""
        return adp_loss(batch.attacked.logits_BEK, batch.labels_B, self) + batch.routing_loss()


def adp_loss(logits_BEK: Tensor, labels_B: Tensor, settings: Adp) -> Tensor:
    """The loss, a mean over the batch. Raises UserError as `diversity` does."""
    return logits_BEK.shape[1] * own_losses(logits_BEK, labels_B) - diversity(logits_BEK, labels_B, settings)


def diversity(logits_BEK: Tensor, labels_B: Tensor, settings: Diversity) -> Tensor:
    """What is subtracted, a mean over the batch. Raises UserError for more experts than wrong classes: they span no
    volume.
    """
    _, experts, classes = logits_BEK.shape
    if experts >= classes:
        raise UserError(
            f"train.recipe: the diversity of ADP sets at most {classes - 1} experts apart for {classes} classes"
        )
    average_BK = torch.logsumexp(functional.log_softmax(logits_BEK, dim=2), dim=1) - math.log(experts)
    entropy_B = -(average_BK.exp() * average_BK).sum(dim=1)
    return (settings.alpha * entropy_B + settings.beta * log_volume(logits_BEK, labels_B)).mean()


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

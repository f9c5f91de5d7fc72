"""Experts that learn from what all of them say of the image before it was attacked.

    loss = -log p_y(x') + weight * mean_e KL(p(x) || p_e(x'))

p(x), the mixture's answer to the clean image as it learns (in train mode), is told as it is: no gradient goes into
it. Soft answers of peers are deep mutual learning (Zhang et al., CVPR 2018); told of clean images to be held on
attacked ones they are robust soft labels (RSLAD, Zi et al., ICCV 2021), with the mixture as its own teacher.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import PositiveFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.trades import divergence


class Mutual(Settings):
    """`weight` of what the experts tell each other."""

    kind: Literal["mutual"]
    weight: PositiveFloat

    def loss(self, batch: Batch) -> Tensor:
        """The experts learn from the clean answer, as below."""
        with torch.no_grad():
            told_BK = batch.clean().log_probs_BK
        return mutual_loss(told_BK, batch.attacked.log_probs_BK, batch.attacked.logits_BEK, batch.labels_B, self)


def mutual_loss(
    clean_BK: Tensor, attacked_BK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: Mutual
) -> Tensor:
    """The loss, a mean over the batch; the first two are log-probabilities of the mixture."""
    experts = logits_BEK.shape[1]
    told_BK = clean_BK.detach().repeat_interleave(experts, dim=0)
    learned = divergence(told_BK, logits_BEK.flatten(0, 1)).mean()
    return functional.nll_loss(attacked_BK, labels_B) + settings.weight * learned

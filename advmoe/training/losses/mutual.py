"""Mutual learning: each expert learns the mixture's output on the clean image.

    loss = -log p_y(x') + weight * mean_e KL(p(x) || p_e(x'))

p(x), the mixture's output on the clean image in train mode, is detached. Learning from the soft labels of peers is deep
mutual learning (Zhang et al., CVPR 2018); soft labels of clean images for attacked ones are robust soft labels (RSLAD,
Zi et al., ICCV 2021), here with the mixture as its own teacher.

Shapes: B batch, E experts, K classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import PositiveFloat, Settings
from advmoe.training.losses.batch import Batch
from advmoe.training.trades import kl_divergence


class Mutual(Settings):
    """`weight` of the divergence from the clean output."""

    kind: Literal["mutual"]
    weight: PositiveFloat

    def loss(self, batch: Batch) -> Tensor:
        """Returns `mutual_loss` with the mixture's output on the clean images as teacher."""
        with torch.no_grad():
            teacher_log_probs_BK = batch.clean().log_probs_BK
        return mutual_loss(
            teacher_log_probs_BK, batch.attacked.log_probs_BK, batch.attacked.logits_BEK, batch.labels_B, self
        )


def mutual_loss(
    clean_BK: Tensor, attacked_BK: Tensor, logits_BEK: Tensor, labels_B: Tensor, settings: Mutual
) -> Tensor:
    """Returns the loss, a mean over the batch; `clean_BK` and `attacked_BK` are log-probabilities of the mixture."""
    experts = logits_BEK.shape[1]
    teacher_log_probs_NK = clean_BK.detach().repeat_interleave(experts, dim=0)
    divergence = kl_divergence(teacher_log_probs_NK, logits_BEK.flatten(0, 1)).mean()
    return functional.nll_loss(attacked_BK, labels_B) + settings.weight * divergence

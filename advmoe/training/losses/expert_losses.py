"""Losses of the experts' own outputs, as several recipes use them.

Shapes: B batch, E experts, N = B * E, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional


def flatten_experts(logits_BEK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the experts' log-probabilities (N, K) and labels (N,), image by image."""
    log_probs_NK = functional.log_softmax(logits_BEK, dim=2).flatten(0, 1)
    return log_probs_NK, labels_B.repeat_interleave(logits_BEK.shape[1])


def expert_cross_entropy(logits_BEK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the experts' own outputs."""
    return functional.nll_loss(*flatten_experts(logits_BEK, labels_B))


def log_prob_of_class(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the log-probability of each image's class (B,)."""
    return log_probs_BK.gather(1, labels_B[:, None]).squeeze(1)


def log_one_minus_top_wrong_prob(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns log(1 - p of the most likely wrong class) of each image (B,): summed over the other classes in log space,
    which avoids cancellation and vanishing gradients.
    """
    wrong_BK = log_probs_BK.scatter(1, labels_B[:, None], -torch.inf)
    others_BK = log_probs_BK.scatter(1, wrong_BK.argmax(dim=1, keepdim=True), -torch.inf)
    return torch.logsumexp(others_BK, dim=1)

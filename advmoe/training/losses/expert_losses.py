"""What the experts say, each for itself: pieces of several objectives.

Shapes: B batch, E experts, N = B * E, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional


def per_expert_batch(logits_BEK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' log-probabilities (N, K) and what they are asked for (N,), image by image."""
    votes_NK = functional.log_softmax(logits_BEK, dim=2).flatten(0, 1)
    return votes_NK, labels_B.repeat_interleave(logits_BEK.shape[1])


def own_losses(logits_BEK: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy of the experts, each asked alone."""
    return functional.nll_loss(*per_expert_batch(logits_BEK, labels_B))


def log_prob_of_class(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The log-probability of each image's class (B,)."""
    return log_probs_BK.gather(1, labels_B[:, None]).squeeze(1)


def without_surest_wrong(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """log(1 - p of the surest wrong class) of each image (B,): summed up from the other classes, in log space, so that
    it neither cancels nor loses its slope.
    """
    wrong_BK = log_probs_BK.scatter(1, labels_B[:, None], -torch.inf)
    others_BK = log_probs_BK.scatter(1, wrong_BK.argmax(dim=1, keepdim=True), -torch.inf)
    return torch.logsumexp(others_BK, dim=1)

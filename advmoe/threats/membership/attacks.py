"""Membership inference attacks: scores that are meant to be higher for images that a network was trained on.

Shapes: N images, K classes, S shadow models.
"""

import torch
from torch import Tensor
from torch.nn import functional

TINY = 1e-30  # lower bound of the variance


def loss_scores(log_probs_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Returns the negative cross-entropy of each image (N,) (Yeom et al. 2018, arXiv 1709.01604)."""
    return -functional.nll_loss(log_probs_NK, labels_N, reduction="none")


def confidence_scores(log_probs_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) of the true class (N,), float64: nearly normal (Carlini et al. 2022, eq. 4)."""
    true_class = log_probs_NK.gather(1, labels_N[:, None]).squeeze(1).double()
    others = torch.logsumexp(log_probs_NK.double().scatter(1, labels_N[:, None], -torch.inf), dim=1)
    return true_class - others


def calibrated_scores(victim_N: Tensor, without_SN: Tensor) -> Tensor:
    """Returns the victim's score minus the mean score of shadow models not trained on the image (N,) (Watson et al.
    2022). `without_SN`: scores of shadow models, NaN where a shadow model was trained on the image.
    """
    return victim_N - without_SN.nanmean(dim=0)


def lira_scores(victim_N: Tensor, with_SN: Tensor, without_SN: Tensor) -> Tensor:
    """Returns LiRA's log-likelihood ratio (N,) of member to non-member: normal distributions whose variance is shared
    by all images (Carlini et al. 2022, arXiv 2112.03570, the variant for few shadow models).

    `with_SN`, `without_SN`: scores of shadow models that were, or were not, trained on an image; NaN otherwise.
    """
    return _log_density(victim_N, with_SN) - _log_density(victim_N, without_SN)


def _log_density(scores_N: Tensor, shadows_SN: Tensor) -> Tensor:
    mean_N = shadows_SN.nanmean(dim=0)
    variance = (shadows_SN - mean_N).square().nanmean().clamp_min(TINY)
    return -(scores_N - mean_N).square() / (2 * variance) - variance.log() / 2

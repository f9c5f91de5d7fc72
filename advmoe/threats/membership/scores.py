"""Scores that are meant to be higher for images that a network was trained on, and how well they tell them.

Members are training images, the others were never trained on; there are as many of each class on both sides.

Shapes: N images, K classes, S shadow models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.errors import UserError
from advmoe.evaluation.intervals import Share
from advmoe.machine import generator
from advmoe.threats.numbers import DIGITS

RATES = (0.001, 0.01)  # false positive rates that are asked for (Carlini et al. 2022)
RESAMPLES = 1000  # of the bootstrap
TAIL = 0.025
TINY = 1e-30


def balanced(members: Tensor, others: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions among members (labels, M) and among others (labels, N): as many of each class on both sides.

    Raises UserError when no class has both.
    """
    chosen_members, chosen_others = [], []
    for label in sorted(set(members.tolist()) & set(others.tolist())):
        inside, outside = ((each == label).nonzero().squeeze(1) for each in (members, others))
        count = min(len(inside), len(outside))
        chosen_members.append(inside[torch.randperm(len(inside), generator=stream)[:count]])
        chosen_others.append(outside[torch.randperm(len(outside), generator=stream)[:count]])
    if not chosen_members:
        raise UserError("membership: no class has both training images and images that were never trained on")
    return torch.cat(chosen_members).sort().values, torch.cat(chosen_others).sort().values


def loss_scores(log_probs_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Minus the cross-entropy (N,): members are expected to lie higher (Yeom et al. 2018, arXiv 1709.01604)."""
    return -functional.nll_loss(log_probs_NK, labels_N, reduction="none")


def confidence_scores(log_probs_NK: Tensor, labels_N: Tensor) -> Tensor:
    """The logit of the true class's probability (N,), log(p / (1 - p)): near normal (Carlini et al. 2022, eq. 4)."""
    own = log_probs_NK.gather(1, labels_N[:, None]).squeeze(1).double()
    others = torch.logsumexp(log_probs_NK.double().scatter(1, labels_N[:, None], -torch.inf), dim=1)
    return own - others


def calibrated_scores(victim_N: Tensor, without_SN: Tensor) -> Tensor:
    """The victim's score minus the mean score of models that did not learn the image (Watson et al. 2022): how much
    easier it is for the victim. `without_SN`: scores of shadow models, NaN where a shadow did learn it.
    """
    return victim_N - without_SN.nanmean(dim=0)


def lira_scores(victim_N: Tensor, with_SN: Tensor, without_SN: Tensor) -> Tensor:
    """Log-likelihood ratio (N,) of "a member" to "not one", normal distributions with one variance for all images each
    (Carlini et al. 2022, arXiv 2112.03570, the form for few shadow models). NaN where a shadow is on the other side.
    """
    return _log_density(victim_N, with_SN) - _log_density(victim_N, without_SN)


def _log_density(scores_N: Tensor, shadows_SN: Tensor) -> Tensor:
    mean_N = shadows_SN.nanmean(dim=0)
    variance = (shadows_SN - mean_N).square().nanmean().clamp_min(TINY)
    return -(scores_N - mean_N).square() / (2 * variance) - variance.log() / 2


@dataclass(frozen=True)
class Leak:
    """How well a score tells members from others: AUC with its 95 % bootstrap interval, the balanced accuracy of the
    best threshold, and true positive rates (Share) by false positive rate.
    """

    auc: float
    low: float
    high: float
    balanced_accuracy: float
    tpr: dict[str, Share]


@dataclass(frozen=True)
class Gap:
    """How much more one score leaks than another: the difference of AUCs with its paired 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Of members (M,) and of other images (N,)."""

    members: Tensor
    others: Tensor

    def drawn(self, stream: torch.Generator) -> "Scores":
        """A bootstrap resample; equal streams draw the same images."""
        return Scores(*(each[torch.randint(len(each), (len(each),), generator=stream)] for each in self._both))

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self.members, self.others

    @property
    def auc(self) -> float:
        """Chance that a member scores higher than another image, ties half."""
        ordered = self.others.sort().values
        below = torch.searchsorted(ordered, self.members)
        up_to = torch.searchsorted(ordered, self.members, right=True)
        return float((below + up_to).double().mean() / 2 / len(ordered))


def leak(scores: Scores, seed: int) -> Leak:
    """The quality of a test. False positive rates below one image say nothing and are left out."""
    low, high = _ends([each.auc for each in _resampled(scores, seed)])
    possible = [rate for rate in RATES if rate * len(scores.others) >= 1]
    return Leak(
        auc=round(scores.auc, DIGITS),
        low=low,
        high=high,
        balanced_accuracy=round(balanced_accuracy(scores), DIGITS),
        tpr={f"{rate:g}": Share.of(caught(scores, rate)) for rate in possible},
    )


def gap(first: Scores, second: Scores, seed: int) -> Gap:
    """Scores of the same images under two networks."""
    pairs = zip(_resampled(first, seed), _resampled(second, seed), strict=True)
    low, high = _ends([mine.auc - other.auc for mine, other in pairs])
    return Gap(round(first.auc - second.auc, DIGITS), low, high)


def _resampled(scores: Scores, seed: int) -> Iterator[Scores]:
    stream = generator(seed, "membership", "bootstrap")
    return (scores.drawn(stream) for _ in range(RESAMPLES))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = torch.tensor(values).quantile(torch.tensor([TAIL, 1 - TAIL])).tolist()
    return round(low, DIGITS), round(high, DIGITS)


def balanced_accuracy(scores: Scores) -> float:
    """The best that any one threshold reaches; an attacker who has to choose it beforehand does no better."""
    thresholds = torch.cat([scores.members, scores.others, torch.tensor([torch.inf])])
    members, others = scores.members.sort().values, scores.others.sort().values
    found = 1 - torch.searchsorted(members, thresholds).double() / len(members)
    spared = torch.searchsorted(others, thresholds).double() / len(others)
    return float(((found + spared) / 2).max())


def caught(scores: Scores, rate: float) -> Tensor:
    """Which members (M,) lie above a threshold that at most a share `rate` of the others exceed."""
    allowed = int(rate * len(scores.others))
    return scores.members > scores.others.sort(descending=True).values[allowed]

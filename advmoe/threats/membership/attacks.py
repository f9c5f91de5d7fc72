"""Scores that are meant to be higher for images that a network was trained on, and how well they tell them.

Members are training images, the others were never trained on; there are as many of each class on both sides.

Shapes: N images, K classes, S shadow models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.runtime.machine import generator
from advmoe.threats.results import DIGITS

RATES = (0.001, 0.01)  # false positive rates that are asked for (Carlini et al. 2022)
RESAMPLES = 1000  # of the bootstrap
TAIL = 0.025
LEAST = 2  # members, and as many others: the threshold for one half is chosen on the other
TINY = 1e-30


def balanced(members: Tensor, others: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions among members (labels, M) and among others (labels, N): as many of each class on both sides.

    Raises UserError when there are hardly any.
    """
    chosen_members, chosen_others = [], []
    for label in sorted(set(members.tolist()) & set(others.tolist())):
        inside, outside = ((each == label).nonzero().squeeze(1) for each in (members, others))
        count = min(len(inside), len(outside))
        chosen_members.append(inside[torch.randperm(len(inside), generator=stream)[:count]])
        chosen_others.append(outside[torch.randperm(len(outside), generator=stream)[:count]])
    if sum(map(len, chosen_members)) < LEAST:
        raise UserError(
            f"membership: {LEAST} training images and as many others of the same classes are needed; "
            "prepare.splits.pool and test hold the others"
        )
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
class Estimate:
    """A number with its 95 % bootstrap interval over images [low, high]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Leak:
    """How well a score tells members from others: AUC, the balanced accuracy of a threshold that was chosen on other
    images, and true positive rates by false positive rate.
    """

    auc: Estimate
    balanced_accuracy: float
    tpr: dict[str, Estimate]


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
    resampled = list(_resampled(scores, seed))
    possible = [rate for rate in RATES if rate * len(scores.others) >= 1]
    return Leak(
        auc=_estimate(scores.auc, [each.auc for each in resampled]),
        balanced_accuracy=round(balanced_accuracy(scores, generator(seed, "membership", "threshold")), DIGITS),
        tpr={f"{rate:g}": _estimate(tpr(scores, rate), [tpr(each, rate) for each in resampled]) for rate in possible},
    )


def gap(first: Scores, second: Scores, seed: int) -> Estimate:
    """How much more one network leaks than another of the same images: the difference of AUCs, resampled in pairs."""
    pairs = zip(_resampled(first, seed), _resampled(second, seed), strict=True)
    return _estimate(first.auc - second.auc, [mine.auc - other.auc for mine, other in pairs])


def _resampled(scores: Scores, seed: int) -> Iterator[Scores]:
    stream = generator(seed, "membership", "bootstrap")
    return (scores.drawn(stream) for _ in range(RESAMPLES))


def _estimate(value: float, resampled: Sequence[float]) -> Estimate:
    low, high = torch.tensor(resampled).quantile(torch.tensor([TAIL, 1 - TAIL])).tolist()
    return Estimate(round(value, DIGITS), round(low, DIGITS), round(high, DIGITS))


def balanced_accuracy(scores: Scores, stream: torch.Generator) -> float:
    """Mean of the shares of members and of others told rightly, each image by the threshold that is best for a random
    half without it: the best threshold for the images themselves would find a leak where there is none.
    """
    halves = list(zip(*(_halved(each, stream) for each in (scores.members, scores.others)), strict=True))
    first, second = (Scores(*half) for half in halves)
    return (_accuracy(first, best_threshold(second)) + _accuracy(second, best_threshold(first))) / 2


def _halved(scores: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    shuffled = scores[torch.randperm(len(scores), generator=stream)]
    return shuffled[: len(scores) // 2], shuffled[len(scores) // 2 :]


def _accuracy(scores: Scores, threshold: float) -> float:
    return float((scores.members >= threshold).double().mean() + (scores.others < threshold).double().mean()) / 2


def best_threshold(scores: Scores) -> float:
    """Where to cut so that most members lie at or above and most others below."""
    candidates = torch.cat([scores.members, scores.others, torch.tensor([torch.inf])])
    members, others = scores.members.sort().values, scores.others.sort().values
    found = 1 - torch.searchsorted(members, candidates).double() / len(members)
    spared = torch.searchsorted(others, candidates).double() / len(others)
    return float(candidates[(found + spared).argmax()])


def tpr(scores: Scores, rate: float) -> float:
    """Share of members above a threshold that at most a share `rate` of the others exceed."""
    return float(caught(scores, rate).float().mean())


def caught(scores: Scores, rate: float) -> Tensor:
    """Which members (M,) lie above that threshold."""
    allowed = int(rate * len(scores.others))
    return scores.members > scores.others.sort(descending=True).values[allowed]

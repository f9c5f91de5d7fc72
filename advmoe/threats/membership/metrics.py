"""Metrics of membership inference: AUC, balanced accuracy and true positive rates of scores, with bootstrap intervals.

Members are training images, non-members are not; both sets have the same number of images of each class.

Shapes: M members, N non-members.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe.core.errors import UserError
from advmoe.runtime.machine import generator
from advmoe.threats.results import DIGITS

FALSE_POSITIVE_RATES = (0.001, 0.01)  # as in Carlini et al. 2022
BOOTSTRAP_RESAMPLES = 1000
TAIL_PROBABILITY = 0.025  # on each side of a 95 % interval
MIN_IMAGES = 2  # members and non-members each: the threshold for one half is chosen on the other


def balanced_subsets(members: Tensor, non_members: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws positions with the same number of images of each class from `members` (labels, M) and `non_members`
    (labels, N); both results are sorted. Raises UserError when fewer than `MIN_IMAGES` remain.
    """
    member_rows, non_member_rows = [], []
    for label in sorted(set(members.tolist()) & set(non_members.tolist())):
        inside, outside = ((labels == label).nonzero().squeeze(1) for labels in (members, non_members))
        count = min(len(inside), len(outside))
        member_rows.append(inside[torch.randperm(len(inside), generator=stream)[:count]])
        non_member_rows.append(outside[torch.randperm(len(outside), generator=stream)[:count]])
    if sum(map(len, member_rows)) < MIN_IMAGES:
        raise UserError(
            f"membership: at least {MIN_IMAGES} training images and non-members of the same classes are needed; "
            "prepare.splits.pool and prepare.splits.test provide the non-members"
        )
    return torch.cat(member_rows).sort().values, torch.cat(non_member_rows).sort().values


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval [low, high] over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MembershipResult:
    """How well a score separates members from non-members: AUC, balanced accuracy with a threshold chosen on held-out
    images, and true positive rates by false positive rate.
    """

    auc: Estimate
    balanced_accuracy: float
    tpr: dict[str, Estimate]


@dataclass(frozen=True)
class Scores:
    """The scores of members (M,) and of non-members (N,)."""

    members: Tensor
    non_members: Tensor

    def resample(self, stream: torch.Generator) -> "Scores":
        """Returns a bootstrap sample; equal streams draw the same images."""
        return Scores(*(scores[torch.randint(len(scores), (len(scores),), generator=stream)] for scores in self._both))

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self.members, self.non_members

    @property
    def auc(self) -> float:
        """Probability that a member scores higher than a non-member; ties count half."""
        ordered = self.non_members.sort().values
        below = torch.searchsorted(ordered, self.members)
        up_to = torch.searchsorted(ordered, self.members, right=True)
        return float((below + up_to).double().mean() / 2 / len(ordered))


def evaluate_scores(scores: Scores, seed: int) -> MembershipResult:
    """Returns the metrics of a score. False positive rates of less than one non-member are left out."""
    samples = list(_bootstrap(scores, seed))
    measurable = [rate for rate in FALSE_POSITIVE_RATES if rate * len(scores.non_members) >= 1]
    return MembershipResult(
        auc=_with_interval(scores.auc, [sample.auc for sample in samples]),
        balanced_accuracy=round(balanced_accuracy(scores, generator(seed, "membership", "threshold")), DIGITS),
        tpr={
            f"{rate:g}": _with_interval(tpr_at_fpr(scores, rate), [tpr_at_fpr(sample, rate) for sample in samples])
            for rate in measurable
        },
    )


def auc_difference(first: Scores, second: Scores, seed: int) -> Estimate:
    """Returns the difference of two networks' AUCs on the same images, with a paired bootstrap interval."""
    pairs = zip(_bootstrap(first, seed), _bootstrap(second, seed), strict=True)
    return _with_interval(first.auc - second.auc, [one.auc - other.auc for one, other in pairs])


def _bootstrap(scores: Scores, seed: int) -> Iterator[Scores]:
    stream = generator(seed, "membership", "bootstrap")
    return (scores.resample(stream) for _ in range(BOOTSTRAP_RESAMPLES))


def _with_interval(value: float, resampled: Sequence[float]) -> Estimate:
    low, high = torch.tensor(resampled).quantile(torch.tensor([TAIL_PROBABILITY, 1 - TAIL_PROBABILITY])).tolist()
    return Estimate(round(value, DIGITS), round(low, DIGITS), round(high, DIGITS))


def balanced_accuracy(scores: Scores, stream: torch.Generator) -> float:
    """Returns the mean of true positive and true negative rate, where the threshold for each random half is the best of
    the other half: the best threshold for the evaluated images themselves would be biased upwards.
    """
    halves = list(zip(*(_random_halves(part, stream) for part in (scores.members, scores.non_members)), strict=True))
    first, second = (Scores(*half) for half in halves)
    return (
        _balanced_accuracy_at(first, best_threshold(second)) + _balanced_accuracy_at(second, best_threshold(first))
    ) / 2


def _random_halves(scores: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    shuffled = scores[torch.randperm(len(scores), generator=stream)]
    return shuffled[: len(scores) // 2], shuffled[len(scores) // 2 :]


def _balanced_accuracy_at(scores: Scores, threshold: float) -> float:
    return float((scores.members >= threshold).double().mean() + (scores.non_members < threshold).double().mean()) / 2


def best_threshold(scores: Scores) -> float:
    """Returns the threshold with the highest balanced accuracy; scores at or above it count as members."""
    candidates = torch.cat([scores.members, scores.non_members, torch.tensor([torch.inf])])
    members, non_members = scores.members.sort().values, scores.non_members.sort().values
    true_positives = 1 - torch.searchsorted(members, candidates).double() / len(members)
    true_negatives = torch.searchsorted(non_members, candidates).double() / len(non_members)
    return float(candidates[(true_positives + true_negatives).argmax()])


def tpr_at_fpr(scores: Scores, rate: float) -> float:
    """Returns the share of members above a threshold that at most a share `rate` of the non-members exceeds."""
    return float(detected_members(scores, rate).float().mean())


def detected_members(scores: Scores, rate: float) -> Tensor:
    """Returns a mask (M,) of the members above that threshold."""
    allowed = int(rate * len(scores.non_members))
    return scores.members > scores.non_members.sort(descending=True).values[allowed]

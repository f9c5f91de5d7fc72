"""Membership inference: scores and metrics by hand, the audited images, the shadow models, and a model that memorises.

Shapes: N images, M members, K classes, S shadow models, U images that shadows are drawn from.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.core import artifacts, console, paths
from advmoe.core.artifacts import hash_tensors
from advmoe.core.errors import UserError
from advmoe.core.settings import load_section, validate
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, DatasetInfo, Split, image_digests
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.machine import generator
from advmoe.threats import victim_training
from advmoe.threats.membership import adhoc, experiment, metrics, report
from advmoe.threats.membership.adhoc import MembershipRequest
from advmoe.threats.membership.attacks import calibrated_scores, confidence_scores, lira_scores, loss_scores
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.membership.experiment import MembershipExperiment
from advmoe.threats.membership.metrics import (
    Estimate,
    MembershipResult,
    Scores,
    auc_difference,
    balanced_accuracy,
    balanced_subsets,
    best_threshold,
    detected_members,
    evaluate_scores,
    tpr_at_fpr,
)
from advmoe.threats.membership.report import Row
from advmoe.threats.victim_training import VictimRecipes, VictimSpec
from advmoe.training.flops import TrainingCost
from advmoe.training.job import TrainingResult
from stages import membership as stage

NAN = math.nan
PGD = {"kind": "pgd", "steps": 1, "step_size": 0.5, "restarts": 1, "loss": "ce", "targets": 0}
SECTION = {"victims": {"mixture": 4}, "against": "mixture", "attack": PGD, "shadow_seed": 1000}
CLASSES = 3

Edit = Callable[[dict[str, Any]], None]


def make_scores(members: list[float], others: list[float]) -> Scores:
    return Scores(torch.tensor(members).double(), torch.tensor(others).double())


def section(**changes: Any) -> MembershipSection:
    return validate(SECTION | changes, MembershipSection, "test")


# ---- metrics of a score


def share(made: Scores, threshold: float) -> float:
    """Mean of the shares of members at or above a threshold and of others below it."""
    found, spared = made.members >= threshold, made.non_members < threshold
    return float((found.double().mean() + spared.double().mean()) / 2)


@pytest.mark.parametrize(
    ("members", "others", "auc", "threshold", "accuracy"),
    [
        ([3, 4], [1, 2], 1.0, 3.0, 1.0),
        ([1, 2], [3, 4], 0.0, 1.0, 0.5),  # calling all images members is as good as calling none
        ([1, 1, 1], [1, 1], 0.5, 1.0, 0.5),
        ([1, 3], [2, 2], 0.5, 3.0, 0.75),
        ([2, 3], [1, 2], 0.875, 2.0, 0.75),  # pairs: 2-1, 3-1, 3-2 won, 2-2 a tie
        ([0, 5], [1], 0.5, 5.0, 0.75),
    ],
    ids=["apart", "reversed", "equal", "between", "tie", "unequal numbers"],
)
def test_auc_and_the_best_threshold_by_hand(
    members: list[float], others: list[float], auc: float, threshold: float, accuracy: float
) -> None:
    made = make_scores(members, others)
    assert made.auc == pytest.approx(auc)
    assert best_threshold(made) == threshold
    assert share(made, threshold) == pytest.approx(accuracy)


def test_auc_is_the_share_of_pairs_with_ties_half() -> None:
    stream = generator("auc")
    members, others = (torch.randint(0, 6, (count,), generator=stream).double() for count in (37, 23))
    wins = (members[:, None] > others).double() + (members[:, None] == others).double() / 2
    assert Scores(members, others).auc == pytest.approx(float(wins.mean()))


@pytest.mark.parametrize("number", range(5))
def test_no_threshold_is_better_than_the_best(number: int) -> None:
    stream = generator("balanced", number)
    members, others = (torch.randint(0, 6, (count,), generator=stream).double() for count in (37, 23))
    made = Scores(members, others)
    assert share(made, best_threshold(made)) == pytest.approx(max(share(made, cut) for cut in range(8)))


@pytest.mark.parametrize(("members", "others"), [(10, 10), (11, 7), (2, 2), (3, 9)], ids=str)
def test_every_image_is_classified_by_the_threshold_of_the_half_without_it(
    monkeypatch: pytest.MonkeyPatch, members: int, others: int
) -> None:
    halves: list[Scores] = []
    made = Scores(torch.randperm(members).double(), torch.randperm(others).double() + 0.5)

    def watched(half: Scores) -> float:
        halves.append(half)
        return best_threshold(half)

    monkeypatch.setattr(metrics, "best_threshold", watched)
    found = balanced_accuracy(made, generator("halves"))
    assert len(halves) == 2
    first, second = halves
    for whole, one, other in (
        (made.members, first.members, second.members),
        (made.non_members, first.non_members, second.non_members),
    ):
        assert torch.equal(torch.cat([one, other]).sort().values, whole.sort().values)
        assert abs(len(one) - len(other)) <= 1
    expected = (share(first, best_threshold(second)) + share(second, best_threshold(first))) / 2
    assert found == pytest.approx(expected)


def test_the_halves_are_drawn_at_random_by_the_stream_alone() -> None:
    stream = generator("random halves")
    made = Scores(torch.randn(41, generator=stream).double() + 0.5, torch.randn(40, generator=stream).double())
    found = [balanced_accuracy(made, generator("stream", number)) for number in (0, 0, *range(1, 12))]
    assert found[0] == found[1]
    assert len(set(found)) > 3


@pytest.mark.parametrize("count", [20, 200])
def test_without_a_difference_the_balanced_accuracy_is_one_half(count: int) -> None:
    """The best threshold for the evaluated images themselves would be biased upwards."""
    told, best = [], []
    for number in range(150):
        stream = generator("no leak", number)
        made = Scores(*(torch.randn(count, generator=stream).double() for _ in range(2)))
        told.append(balanced_accuracy(made, stream))
        best.append(share(made, best_threshold(made)))
    assert sum(told) / len(told) == pytest.approx(0.5, abs=0.02)
    assert min(best) >= 0.5
    assert sum(best) / len(best) > 0.5 + 0.3 / math.sqrt(count)


@pytest.mark.parametrize(("members", "others"), [(2, 2), (3, 5), (100, 60)], ids=str)
def test_for_separated_scores_the_balanced_accuracy_is_one(members: int, others: int) -> None:
    """Far apart: the lowest member of one half still lies above every other image of the other."""
    made = Scores(torch.full((members,), 2.0), torch.zeros(others))
    assert balanced_accuracy(made, generator("apart")) == 1
    assert evaluate_scores(made, 0).balanced_accuracy == 1


def test_the_balanced_accuracy_of_normals_one_deviation_apart() -> None:
    """The best threshold lies in the middle: Phi(1/2) = 69.1 %."""
    stream = generator("normals")
    made = Scores(torch.randn(4000, generator=stream).double() + 1, torch.randn(4000, generator=stream).double())
    assert balanced_accuracy(made, stream) == pytest.approx(0.691, abs=0.015)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.0, [False, False, True]), (0.25, [False, True, True]), (0.5, [False, True, True]), (0.75, [True, True, True])],
    ids=str,
)
def test_members_are_detected_above_the_threshold_of_that_rate(rate: float, expected: list[bool]) -> None:
    made = make_scores([1.5, 3.5, 4.5], [1, 2, 3, 4])
    assert detected_members(made, rate).tolist() == expected
    assert tpr_at_fpr(made, rate) == pytest.approx(sum(expected) / 3)


def test_a_tie_with_a_non_member_is_not_detected() -> None:
    made = make_scores([4, 4], [1, 2, 3, 4])
    assert detected_members(made, 0.0).tolist() == [False, False]
    stream = generator("rate")
    many = Scores(torch.randint(0, 50, (500,), generator=stream), torch.randint(0, 50, (500,), generator=stream))
    for rate in (0.01, 0.1, 0.3):
        allowed = int(rate * 500)
        cut = many.non_members.sort(descending=True).values[allowed]
        assert int((many.non_members > cut).sum()) <= allowed


@pytest.mark.parametrize(
    ("others", "rates"), [(99, []), (100, ["0.01"]), (999, ["0.01"]), (1000, ["0.001", "0.01"])], ids=str
)
def test_rates_below_one_image_are_left_out(others: int, rates: list[str]) -> None:
    stream = generator("rates")
    made = Scores(torch.randn(50, generator=stream).double(), torch.randn(others, generator=stream).double())
    assert list(evaluate_scores(made, 0).tpr) == rates


def test_a_result_has_an_interval_around_its_auc_and_is_repeatable() -> None:
    stream = generator("leak")
    made = Scores(torch.randn(200, generator=stream).double() + 1, torch.randn(200, generator=stream).double())
    found = evaluate_scores(made, 0)
    assert found.auc.low < found.auc.value < found.auc.high
    assert found.auc.value == pytest.approx(made.auc, abs=1e-6)
    assert found.auc.value == pytest.approx(0.76, abs=0.06)  # of normals one deviation apart
    assert 0.05 < found.auc.high - found.auc.low < 0.15
    assert evaluate_scores(made, 0) == found
    rate = found.tpr["0.01"]
    assert rate.value == pytest.approx(tpr_at_fpr(made, 0.01), abs=1e-6)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high
    assert evaluate_scores(made, 1).auc.value == found.auc.value
    assert evaluate_scores(made, 1).auc != found.auc  # other resamples


def test_the_interval_of_a_rate_includes_the_uncertainty_of_its_threshold() -> None:
    """5000 members would leave 1 % of uncertainty; the highest two of 100 others leave much more."""
    stream = generator("few others")
    made = Scores(torch.randn(5000, generator=stream).double() + 1, torch.randn(100, generator=stream).double())
    rate = evaluate_scores(made, 0).tpr["0.01"]
    assert rate.high - rate.low > 0.1
    assert rate.low <= tpr_at_fpr(made, 0.01) <= rate.high


def test_separated_scores_have_intervals_without_width() -> None:
    made = Scores(torch.full((150,), 2.0), torch.zeros(120))
    assert evaluate_scores(made, 0) == MembershipResult(Estimate(1.0, 1.0, 1.0), 1.0, {"0.01": Estimate(1.0, 1.0, 1.0)})


def test_an_auc_difference_is_paired_image_by_image() -> None:
    stream = generator("gap")
    members, others = torch.randn(100, generator=stream).double() + 0.5, torch.randn(100, generator=stream).double()
    first = Scores(members, others)
    assert auc_difference(first, first, 0) == Estimate(0.0, 0.0, 0.0)
    assert auc_difference(first, Scores(members * 2 + 3, others * 2 + 3), 0) == Estimate(
        0.0, 0.0, 0.0
    )  # the same order
    other = Scores(members - 0.05, others)
    nearly = auc_difference(first, other, 0)
    assert 0 < nearly.value < 0.05
    assert nearly.value == pytest.approx(first.auc - other.auc, abs=1e-6)
    assert nearly.low <= nearly.value <= nearly.high
    assert nearly.high - nearly.low < 0.03  # unpaired it would be ten times that
    assert evaluate_scores(first, 0).auc.high - evaluate_scores(first, 0).auc.low > 0.1
    assert auc_difference(other, first, 0).value == -nearly.value


# ---- scores


def test_loss_and_confidence_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]).double()
    labels = torch.tensor([0, 1])
    assert loss_scores(probabilities.log(), labels).tolist() == pytest.approx([math.log(0.7), math.log(0.25)])
    confident = confidence_scores(probabilities.log(), labels).tolist()
    assert confident == pytest.approx([math.log(0.7 / 0.3), math.log(0.25 / 0.75)])


def test_the_confidence_of_a_certain_model_is_finite() -> None:
    """In float32 the probability would be 1 and its logit infinite."""
    logits = torch.tensor([[100.0, 0.0, 0.0]]).double()
    (found,) = confidence_scores(logits.log_softmax(1), torch.tensor([0])).tolist()
    assert found == pytest.approx(100 - math.log(2))


def test_calibration_uses_only_shadows_that_did_not_learn_the_image() -> None:
    victim = torch.tensor([5.0, 5.0, 5.0])
    without = torch.tensor([[1.0, NAN, 2.0], [3.0, 4.0, NAN], [NAN, NAN, 6.0]])
    assert calibrated_scores(victim, without).tolist() == [3.0, 1.0, 1.0]


def test_the_likelihood_ratio_by_hand() -> None:
    victim = torch.tensor([1.0, 0.0])
    inside = torch.tensor([[2.0, NAN], [NAN, 3.0], [0.0, NAN], [NAN, 1.0]]).double()  # means 1 and 2, variance 1
    outside = torch.tensor([[NAN, 2.0], [2.0, NAN], [NAN, -2.0], [-2.0, NAN]]).double()  # means 0 and 0, variance 4
    densities = [
        (-0.0 / 2, -1.0 / 8 - math.log(4) / 2),
        (-4.0 / 2, -0.0 / 8 - math.log(4) / 2),
    ]
    expected = [mine - other for mine, other in densities]
    assert lira_scores(victim.double(), inside, outside).tolist() == pytest.approx(expected)


def shadows(images: int, lift: float, count: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Victim's scores of members and others and the shadows' with and without; hardness differs by image."""
    stream = generator("shadows", lift)
    hardness_N = 5 * torch.randn(images, generator=stream).double()
    is_member = torch.arange(images) < images // 2
    knows_SN = experiment.random_halves(count, images, stream)
    victim_N = hardness_N + lift * is_member + 0.3 * torch.randn(images, generator=stream).double()
    scores_SN = hardness_N + lift * knows_SN + 0.3 * torch.randn(count, images, generator=stream).double()
    with_SN, without_SN = (scores_SN.where(side, torch.nan) for side in (knows_SN, ~knows_SN))
    return victim_N, is_member, with_SN, without_SN


def test_the_likelihood_ratio_separates_where_a_threshold_cannot() -> None:
    victim_N, is_member, with_SN, without_SN = shadows(1000, lift=2.0)

    def told(scores_N: Tensor) -> float:
        return Scores(scores_N[is_member], scores_N[~is_member]).auc

    assert told(victim_N) < 0.7
    assert told(lira_scores(victim_N, with_SN, without_SN)) > 0.99
    assert told(calibrated_scores(victim_N, without_SN)) > 0.99
    # sides mixed up would be as good as a coin, or worse
    assert told(lira_scores(victim_N, without_SN, with_SN)) < 0.01


def test_the_likelihood_ratio_of_a_model_without_memory_has_auc_one_half() -> None:
    victim_N, is_member, with_SN, without_SN = shadows(4000, lift=0.0)
    for found in (lira_scores(victim_N, with_SN, without_SN), calibrated_scores(victim_N, without_SN)):
        assert Scores(found[is_member], found[~is_member]).auc == pytest.approx(0.5, abs=0.03)


def test_equal_shadows_on_both_sides_give_ratio_zero() -> None:
    same = torch.randn(4, 10, generator=generator("same")).double()
    assert lira_scores(torch.arange(10).double(), same, same).tolist() == [0.0] * 10


def test_two_shadows_one_on_each_side_still_give_a_ratio() -> None:
    """One score a side has no spread; the nearer side wins."""
    inside, outside = torch.tensor([[3.0, NAN], [NAN, 3.0]]), torch.tensor([[NAN, 1.0], [1.0, NAN]])
    found = lira_scores(torch.tensor([2.9, 1.1]), inside, outside)
    assert found.isfinite().all()
    assert found[0] > 0 > found[1]


# ---- the audited images


@pytest.mark.parametrize(("count", "images"), [(2, 10), (4, 11), (8, 500)], ids=str)
def test_every_image_is_in_exactly_half_of_the_shadows(count: int, images: int) -> None:
    knows = experiment.random_halves(count, images, generator("halves"))
    assert knows.shape == (count, images)
    assert (knows.sum(0) == count // 2).all()
    for number in range(0, count, 2):
        assert torch.equal(knows[number], ~knows[number + 1])
        assert int(knows[number].sum()) == images // 2
    if count > 2:
        assert not torch.equal(knows[0], knows[2])


def test_without_shadows_there_are_no_halves() -> None:
    assert experiment.random_halves(0, 10, generator("halves")).shape == (0, 10)


def test_both_sides_have_as_many_images_of_each_class() -> None:
    members, others = torch.tensor([0] * 5 + [1] * 2 + [2] * 3), torch.tensor([0] * 2 + [1] * 4 + [3] * 3)
    inside, outside = balanced_subsets(members, others, generator("balanced"))
    assert torch.bincount(members[inside], minlength=4).tolist() == [2, 2, 0, 0]
    assert torch.bincount(others[outside], minlength=4).tolist() == [2, 2, 0, 0]
    assert len(set(inside.tolist())) == len(inside)
    assert len(set(outside.tolist())) == len(outside)
    with pytest.raises(UserError, match="at least 2 training images and non-members of the same classes are needed"):
        balanced_subsets(torch.tensor([0, 1]), torch.tensor([2, 3]), generator("balanced"))


FACTS = DatasetInfo(channels=1, height=2, width=2, class_names=("a", "b", "c"), mean=(0.5,), std=(0.3,))
SIZES = {"train": 120, "pool": 60, "validation": 20, "test": 60}


def make_data() -> Dataset:
    """Images that say what they are: their class, how hard they are, and their number."""
    splits, start = {}, 0
    for name, count in SIZES.items():
        number = torch.arange(start, start + count)
        labels = torch.randint(0, CLASSES, (count,), generator=generator("labels", name))
        images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
        images[:, 0, 0, 0] = labels.to(torch.uint8)
        images[:, 0, 0, 1] = torch.randint(0, 256, (count,), generator=generator("hard", name), dtype=torch.uint8)
        images[:, 0, 1, 0], images[:, 0, 1, 1] = (number // 256).to(torch.uint8), (number % 256).to(torch.uint8)
        splits[name] = Split(images, labels, number)
        start += count
    return Dataset(splits, FACTS, "sha256")  # type: ignore[arg-type]


def test_members_are_training_images_and_the_others_were_never_trained_on() -> None:
    data = make_data()
    audit = experiment.draw_audit(data, 0)
    members, others = audit.split.index[audit.is_member], audit.split.index[~audit.is_member]
    assert set(members.tolist()) <= set(data["train"].index.tolist())
    assert set(others.tolist()) <= {*data["pool"].index.tolist(), *data["test"].index.tolist()}
    assert len(members) == len(others) > 90
    counts = [torch.bincount(audit.split.labels[side]).tolist() for side in (audit.is_member, ~audit.is_member)]
    assert counts[0] == counts[1]
    # the position leads from the audited image to the same one of the universe
    assert torch.equal(audit.universe.index[audit.position], audit.split.index)
    assert torch.equal(audit.universe.images[audit.position], audit.split.images)
    assert len(audit.universe) == SIZES["train"] + SIZES["pool"] + SIZES["test"]
    assert not set(audit.universe.index.tolist()) & set(data["validation"].index.tolist())


def with_copies(data: Dataset, **rows: tuple[str, list[int], list[int]]) -> Dataset:
    """Images of one split written over those of another, with their labels: what a source holds twice."""
    splits = dict(data.splits)
    for name, (source, to, given) in rows.items():
        mine, theirs = data.splits[name], data.splits[source]  # type: ignore[index]
        images, labels = mine.images.clone(), mine.labels.clone()
        images[to], labels[to] = theirs.images[given], theirs.labels[given]
        splits[name] = Split(images, labels, mine.index)  # type: ignore[index]
    return Dataset(splits, data.facts, data.sha256)


@pytest.mark.parametrize("seed", range(3))
def test_a_duplicate_of_a_training_image_is_no_non_member(seed: int) -> None:
    """The source may hold an image twice: whatever split it was drawn into, the network learned it."""
    data = with_copies(
        make_data(), pool=("train", list(range(40)), list(range(40))), test=("train", [0, 7, 59], [0, 100, 100])
    )
    audit = experiment.draw_audit(data, seed)
    known = set(image_digests(data["train"].images))
    others = audit.split.images[~audit.is_member]
    assert not set(image_digests(others)) & known
    assert set(image_digests(audit.split.images[audit.is_member])) <= known
    assert int(audit.is_member.sum()) == len(others) > 50
    # shadows do not learn them under a second number either
    left = {*range(120), *range(160, 180), *range(200, 260)} - {200, 207, 259}
    assert set(audit.universe.index.tolist()) == left
    assert len(audit.universe) == len(left)
    assert torch.equal(audit.universe.images[audit.position], audit.split.images)
    assert torch.equal(audit.universe.index[audit.position], audit.split.index)
    counts = [torch.bincount(audit.split.labels[side]).tolist() for side in (audit.is_member, ~audit.is_member)]
    assert counts[0] == counts[1]


def test_an_image_of_one_other_level_is_no_training_image() -> None:
    data = make_data()
    pool = data["pool"]
    images = data["train"].images[:60].clone()
    images[:, 0, 0, 1] ^= 1
    near = Split(images, data["train"].labels[:60], pool.index)
    audit = experiment.draw_audit(Dataset({**data.splits, "pool": near}, data.facts, data.sha256), 0)
    assert set(pool.index.tolist()) <= set(audit.universe.index.tolist())


def test_duplicates_of_training_images_alone_are_refused() -> None:
    data = with_copies(
        make_data(),
        pool=("train", list(range(60)), list(range(60))),
        test=("train", list(range(60)), list(range(60, 120))),
    )
    with pytest.raises(UserError, match="at least 2 training images and non-members of the same classes are needed"):
        experiment.draw_audit(data, 0)


def test_the_draw_is_the_seeds_alone() -> None:
    first, again, other = (experiment.draw_audit(make_data(), seed).position for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- a model that memorises


class Memory(nn.Module):
    """Sure of an image's class as far as the image is easy, and surer by `lift` where it was trained on it."""

    def __init__(self, known: Tensor, lift: float) -> None:
        super().__init__()
        self.is_known = nn.Parameter(torch.zeros(1000).index_fill(0, known, 1.0))
        self.lift = lift

    def forward(self, images_BCHW: Tensor) -> Tensor:
        levels = (images_BCHW[:, 0] * 255).round().long()
        number = (levels[:, 1, 0] * 256 + levels[:, 1, 1]).clamp(0, 999)
        sure = levels[:, 0, 1] / 255 * 6 + self.lift * self.is_known[number]
        own = nn.functional.one_hot(levels[:, 0, 0].clamp(0, CLASSES - 1), CLASSES)
        # a slope for an attack to climb, too small to be seen elsewhere
        return sure[:, None] * own + 1e-6 * images_BCHW.flatten(1)[:, :CLASSES]


class SmallRecipes:
    """What the audit itself reads of the recipes."""

    seed, pretrain = 0, SimpleNamespace(precision="float32")

    def __init__(self, epsilon: float, checkpoint_dir: Path | None = None) -> None:
        self.epsilon, self.checkpoint_dir = epsilon, checkpoint_dir

    def with_seed_offset(self, seed_offset: int) -> int:
        return seed_offset


def make_case(epsilon: float = 0.25 / 255, **changes: Any) -> MembershipExperiment:
    """Attacks stay within a quarter of a level, which the memory rounds away."""
    return MembershipExperiment(section(**changes), cast(VictimRecipes, SmallRecipes(epsilon)))


def audited(monkeypatch: pytest.MonkeyPatch, lift: float) -> dict[tuple[str, str], Scores]:
    """The audit of such a model with four shadows of its kind."""
    data = make_data()
    audit = experiment.draw_audit(data, 0)

    def train_shadows(
        case: MembershipExperiment, audit: experiment.Audit, victim: str
    ) -> tuple[Tensor, list[nn.Module]]:
        knows = experiment.random_halves(case.section.victims[victim], len(audit.universe), generator("test"))
        return knows, [Memory(audit.universe.index[row], lift).eval() for row in knows]

    monkeypatch.setattr(experiment, "train_shadows", train_shadows)
    case = make_case()
    answers = experiment.cached_log_probs(Memory(data["train"].index, lift).eval(), case, audit)
    return experiment._membership_scores(case, audit, "mixture", answers)


def test_answers_from_before_an_interruption_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()
    case = MembershipExperiment(section(), cast(VictimRecipes, SmallRecipes(0.25 / 255, tmp_path)))
    audit, one, other = (
        experiment.draw_audit(data, 0),
        *(Memory(data["train"].index, lift).eval() for lift in (1.0, 2.0)),
    )
    expected = experiment.cached_log_probs(one, case, audit)
    assert len(list(tmp_path.iterdir())) == 1
    asked: list[nn.Module] = []

    def watched(model: nn.Module, *_: object) -> experiment.LogProbs:
        asked.append(model)
        return {experiment.CLEAN: torch.zeros(1), experiment.ADVERSARIAL: torch.zeros(1)}

    monkeypatch.setattr(experiment, "_compute_log_probs", watched)
    found = experiment.cached_log_probs(one, case, audit)
    assert {kind: hash_tensors({kind: each}) for kind, each in found.items()} == {
        kind: hash_tensors({kind: each}) for kind, each in expected.items()
    }
    assert list(found) == list(expected)  # or rows come in another order
    assert asked == []
    experiment.cached_log_probs(other, case, audit)
    assert asked == [other]


@pytest.mark.parametrize("queries", [experiment.CLEAN, experiment.ADVERSARIAL])
def test_a_model_that_memorises_is_detected(monkeypatch: pytest.MonkeyPatch, queries: str) -> None:
    found = {test: made.auc for (test, kind), made in audited(monkeypatch, lift=2.0).items() if kind == queries}
    assert found["LiRA"] > 0.999
    assert found["calibrated"] > 0.999
    assert 0.6 < found["loss"] < 0.9  # hard images hide among the others


@pytest.mark.parametrize("queries", [experiment.CLEAN, experiment.ADVERSARIAL])
def test_a_model_that_memorises_strongly_is_detected_without_shadows(
    monkeypatch: pytest.MonkeyPatch, queries: str
) -> None:
    found = {test: made.auc for (test, kind), made in audited(monkeypatch, lift=20.0).items() if kind == queries}
    assert found["loss"] > 0.999
    assert found["LiRA"] > 0.999


def test_a_model_that_memorises_nothing_is_not_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in audited(monkeypatch, lift=0.0).values():
        assert made.auc == pytest.approx(0.5, abs=0.08)


def test_shadows_are_on_the_side_of_what_they_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scores are given: every shadow's number for an image lies with those that learned it, or without."""
    sides: list[tuple[Tensor, Tensor]] = []
    real = lira_scores

    def watched(victim_N: Tensor, with_SN: Tensor, without_SN: Tensor) -> Tensor:
        sides.append((with_SN, without_SN))
        return real(victim_N, with_SN, without_SN)

    monkeypatch.setattr(experiment, "lira_scores", watched)
    audited(monkeypatch, lift=2.0)
    assert len(sides) == 2  # clean and adversarial
    for with_SN, without_SN in sides:
        assert (with_SN.isnan() ^ without_SN.isnan()).all()
        assert (with_SN.isnan().sum(0) == 2).all()  # of four
        assert float((with_SN.nanmean(0) - without_SN.nanmean(0)).min()) > 1.9


class Asked:
    """Spies on what is crafted on which network, and what which network is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.crafted: list[tuple[nn.Module, Tensor]] = []
        self.asked: list[tuple[nn.Module, Tensor]] = []
        ascend_all, log_probs = engine.attack_without_early_stop, experiment.log_probs

        def crafted(model: nn.Module, *rest: Any, **keywords: Any) -> Tensor:
            found = ascend_all(model, *rest, **keywords)
            self.crafted.append((model, found))
            return found

        def asked(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
            self.asked.append((model, pixels_NCHW))
            return log_probs(model, pixels_NCHW)

        monkeypatch.setattr(engine, "attack_without_early_stop", crafted)
        monkeypatch.setattr(experiment, "log_probs", asked)


class Linear(nn.Module):
    """logits = W x."""

    def __init__(self, *seed: object) -> None:
        super().__init__()
        self.weight_KP = nn.Parameter(torch.randn(CLASSES, 4, generator=generator(*seed)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1) @ self.weight_KP.T


def test_adversarial_queries_are_crafted_on_the_network_that_is_asked_victim_and_shadows_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    audit, case = experiment.draw_audit(make_data(), 0), make_case()
    victim, shadows_S = Linear("victim"), [Linear("shadow", number) for number in range(4)]
    knows = experiment.random_halves(4, len(audit.universe), generator("test"))
    monkeypatch.setattr(experiment, "train_shadows", lambda *_: (knows, shadows_S))
    spy = Asked(monkeypatch)
    found = experiment._membership_scores(case, audit, "mixture", experiment.cached_log_probs(victim, case, audit))
    networks = [victim, *shadows_S]
    assert [id(model) for model, _ in spy.crafted] == [id(model) for model in networks]
    assert [id(model) for model, _ in spy.asked] == [id(model) for model in networks for _ in ("clean", "adversarial")]
    clean = audit.split.pixels()
    for (_, crafted), (_, first), (_, second) in zip(spy.crafted, spy.asked[::2], spy.asked[1::2], strict=True):
        assert torch.equal(first, clean)
        assert torch.equal(second, crafted)
        assert 0 < (second - clean).abs().max() <= case.recipes.epsilon + 1e-6
    attacked = [images for _, images in spy.crafted]
    assert not any(torch.equal(attacked[0], other) for other in attacked[1:])
    assert set(found) == {
        (test, kind) for test in ("loss", "calibrated", "LiRA") for kind in (experiment.CLEAN, experiment.ADVERSARIAL)
    }


def test_a_network_answers_worse_to_queries_crafted_on_itself_than_to_those_of_another() -> None:
    audit, case = experiment.draw_audit(make_data(), 0), make_case(0.1, attack=PGD | {"steps": 5})
    labels, loss = audit.split.labels, {}
    mine, other = Linear("mine"), Linear("other")
    with pytest.MonkeyPatch.context() as patch:
        spy = Asked(patch)
        for name, network in (("mine", mine), ("other", other)):
            told = experiment.cached_log_probs(network, case, audit)
            assert (loss_scores(told["adversarial"], labels) <= loss_scores(told["clean"], labels) + 1e-6).all()
            loss[name] = float(loss_scores(told["adversarial"], labels).mean())
    ((_, on_mine), (_, on_other)) = spy.crafted
    assert float(loss_scores(experiment.log_probs(mine, on_other), labels).mean()) > loss["mine"] + 0.01
    assert float(loss_scores(experiment.log_probs(other, on_mine), labels).mean()) > loss["other"] + 0.01


def test_answers_are_log_probabilities_on_the_cpu_in_double_precision() -> None:
    model, pixels = Linear("answers"), torch.rand(7, 1, 2, 2, generator=generator("pixels"))
    told = experiment.log_probs(model, pixels)
    assert (told.dtype, told.device.type, told.shape) == (torch.float64, "cpu", (7, CLASSES))
    assert torch.allclose(told.exp().sum(1), torch.ones(7).double())
    with torch.no_grad():
        assert torch.allclose(told, model(pixels).double().log_softmax(1), atol=1e-6)
    assert not told.requires_grad


def test_shadows_are_trained_as_the_victim_on_their_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[VictimSpec] = []

    def train_all(ordered: list[VictimSpec]) -> list[TrainingResult]:
        orders.extend(ordered)
        return [TrainingResult(nn.Flatten(), [], {}, [], TrainingCost(0, 0, 0, 0, 0, 0, 0), 0.0) for _ in ordered]

    monkeypatch.setattr(experiment, "train_victims", train_all)
    audit = experiment.draw_audit(make_data(), 3)
    knows, models = experiment.train_shadows(make_case(), audit, "mixture")
    assert (knows.shape, len(models)) == ((4, len(audit.universe)), 4)
    assert [cast(int, order.recipes) for order in orders] == [1000, 1001, 1002, 1003]
    assert [order.victim for order in orders] == ["mixture"] * 4
    for order, row in zip(orders, knows, strict=True):
        assert order.train is not None
        assert torch.equal(order.train.index, audit.universe.index[row])
        assert torch.equal(order.train.labels, audit.universe.labels[row])


# ---- the stage


@pytest.fixture
def pipeline(project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The small project with an untrained mixture and an untrained baseline."""
    victims = {"mixture": 0, "standard": 0}
    edit({"membership": SECTION | {"victims": victims, "against": "standard"}})
    monkeypatch.setattr(artifacts, "_git", lambda *_: None)
    monkeypatch.setattr(metrics, "BOOTSTRAP_RESAMPLES", 50)
    data = dataset.load(paths.DATASET)
    architecture = PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="resnet18", width=2))
    model = classifiers.build(architecture, data.facts, 7)
    path = paths.artifact("baseline", "standard")
    classifiers.save(path, model, architecture, data.facts, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    victim_training._clean_dataset.cache_clear()
    yield project
    victim_training._clean_dataset.cache_clear()


def test_the_stage_audits_its_victims_and_writes_it_down(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del pipeline
    stage.run()
    said = " ".join(capsys.readouterr().out.split())
    rows, about = report.read(Path("metrics/membership/all.json"))
    assert [(row.victim, row.score, row.queries) for row in rows] == [
        (victim, "loss", queries) for victim in ("mixture", "standard") for queries in ("clean", "adversarial")
    ]
    assert about["members"] == about["others"] > 500
    assert f"membership: {about['members']} training images, {about['others']} non-members" in said
    assert "0.1 % of the non-members is less than one image" in said
    for row in rows:
        assert list(row.result.tpr) == ["0.01"]
        assert row.result.auc.value == pytest.approx(0.5, abs=0.1)  # nobody was trained
        assert row.result.balanced_accuracy == pytest.approx(0.5, abs=0.08)
        assert row.result.auc.low < row.result.auc.value < row.result.auc.high
        assert (row.auc_difference is None) == (row.victim == "standard")
    head = json.loads(Path("metrics/membership.json").read_text())
    assert head["mixture"]["loss"]["clean"]["auc"] == rows[0].result.auc.value
    assert head["standard"]["loss"]["adversarial"].keys() == {"auc", "balanced_accuracy", "tpr_at_0.01"}
    before = Path("metrics/membership/all.json").read_bytes()
    stage.run()
    assert Path("metrics/membership/all.json").read_bytes() == before


def test_a_quick_run_writes_to_a_new_folder_in_runs(pipeline: Path) -> None:
    stage.run()
    recorded = {path: path.read_bytes() for path in Path("metrics").rglob("*") if path.is_file()}
    outputs = adhoc.run_request(MembershipRequest())
    assert outputs.metrics.parent.parent == Path("runs")
    assert outputs.metrics.parent.name.startswith("membership-")
    assert sorted(path.name for path in outputs.metrics.parent.iterdir()) == ["metrics.json", "runs.json"]
    assert outputs.metrics.read_bytes() == recorded[Path("metrics/membership.json")]
    assert outputs.runs.read_bytes() == recorded[Path("metrics/membership/all.json")]
    assert recorded == {path: path.read_bytes() for path in Path("metrics").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="nobody"):
        adhoc.run_request(MembershipRequest(victims=("nobody",)))
    assert len(list((pipeline / "runs").iterdir())) == 1


@pytest.mark.parametrize(("victims", "against"), [(("standard", "mixture"), "standard"), (("mixture",), "mixture")])
def test_named_victims_are_compared_with_against_or_the_first(
    pipeline: Path, victims: tuple[str, ...], against: str
) -> None:
    del pipeline
    rows, _ = report.read(adhoc.run_request(MembershipRequest(victims)).runs)
    assert list(dict.fromkeys(row.victim for row in rows)) == list(victims)
    assert {row.victim for row in rows if row.auc_difference is None} == {against}
    assert {row.shadows for row in rows} == {0}


def test_a_network_that_overfits_is_detected_by_its_loss(pipeline: Path) -> None:
    """Labels of chance can only be learned by heart: those learned are known, the others are not."""
    del pipeline
    data = dataset.load(paths.DATASET)
    audit = experiment.draw_audit(data, 0)
    few = audit.is_member.nonzero().squeeze(1)[:60]
    images = audit.split.pixels()
    labels = torch.randint(0, 10, (len(images),), generator=generator("chance"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    steps = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    aucs = []
    for number in range(150):
        if number in (0, 149):
            found = loss_scores(experiment.log_probs(model.eval(), images), labels)
            aucs.append(Scores(found[few], found[~audit.is_member]).auc)
        steps.zero_grad()
        nn.functional.cross_entropy(model(images[few]), labels[few]).backward()  # type: ignore[no-untyped-call]
        steps.step()
    assert aucs[0] == pytest.approx(0.5, abs=0.1)
    assert aucs[1] > 0.9


def test_shadows_of_a_baseline_are_trained_by_its_own_recipe(
    pipeline: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del pipeline
    spy = Asked(monkeypatch)
    edit({"membership.victims": {"standard": 2}, "membership.against": "standard"})
    stage.run()
    assert "standard: 2 shadow models" in capsys.readouterr().out
    rows, _ = report.read(Path("metrics/membership/all.json"))
    assert {row.score for row in rows} == {"loss", "calibrated", "LiRA"}
    for row in rows:
        assert row.shadows == 2
        assert row.result.auc.value == pytest.approx(0.5, abs=0.1)  # this victim was never trained, its shadows were
    assert len({id(model) for model, _ in spy.crafted}) == len(spy.crafted) == 3  # the victim and both shadows
    assert [id(model) for model, _ in spy.asked[1::2]] == [id(model) for model, _ in spy.crafted]
    assert all(asked is made for (_, asked), (_, made) in zip(spy.asked[1::2], spy.crafted, strict=True))


# ---- results on disk


def make_row(victim: str = "mixture", beyond: Estimate | None = None, rates: tuple[str, ...] = ("0.01",)) -> Row:
    found = MembershipResult(Estimate(0.61, 0.55, 0.66), 0.58, {rate: Estimate(0.03, 0.01, 0.085) for rate in rates})
    return Row(victim, "LiRA", "clean", 4, found, beyond)


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_row("mixture", Estimate(0.1, -0.05, 0.2)), make_row("standard")]
    about = {"epsilon": 0.1, "members": 100, "others": 100}
    report.write(rows, about, tmp_path / "head.json", tmp_path / "all.json")
    assert report.read(tmp_path / "all.json") == (rows, about)
    head = json.loads((tmp_path / "head.json").read_text())
    assert head["mixture"]["LiRA"]["clean"] == {"auc": 0.61, "balanced_accuracy": 0.58, "tpr_at_0.01": 0.03}
    assert (head["members"], head["epsilon"]) == (100, 0.1)


@pytest.mark.parametrize("content", ["[]", '{"rows": []}', '{"schema_version": 1}'], ids=str)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "all.json").write_text(content)
    with pytest.raises(UserError, match=r"all\.json: not a result of this version"):
        report.read(tmp_path / "all.json")


@pytest.mark.parametrize("rates", [("0.01",), ("0.001", "0.01")], ids=len)
def test_the_table_says_which_rate_is_too_small_to_measure(
    rates: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    report.show([make_row(rates=rates)], {"members": 100, "others": 100})
    said = capsys.readouterr().out
    assert ("less than one image" in said) == ("0.001" not in rates)
    assert "0.610 [0.550," in said


def test_every_number_of_the_table_has_its_interval() -> None:
    """Differences with their sign, shares in percent."""
    shown: list[list[list[str]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "table", lambda _title, _columns, lines: shown.append(lines))
        report.show([make_row(beyond=Estimate(0.1, -0.05, 0.2)), make_row("standard")], {"members": 9, "others": 9})
    ((first, second),) = shown
    assert first[3:] == ["0.610 [0.550, 0.660]", "+0.100 [-0.050, +0.200]", "58.0", "3.0 [1.0, 8.5]"]
    assert second[3:] == ["0.610 [0.550, 0.660]", "", "58.0", "3.0 [1.0, 8.5]"]


def test_nothing_is_shown_where_nothing_is_on_record(inputs_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del inputs_only
    report.show_record()
    assert capsys.readouterr().out == ""


# ---- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"victims": {"mixture": 3}}, "victims.mixture: "),
        ({"victims": {"mixture": -2}}, "victims.mixture: "),
        ({"victims": {"mixture": 2.0}}, "victims.mixture: "),
        ({"victims": {}}, "victims: "),
        ({"against": "standard"}, "against is 'standard', but victims has only mixture"),
        ({"shadow_seed": -1}, "shadow_seed: "),
        ({"attack": PGD | {"steps": 0}}, "attack.steps: "),
        ({"shadows": 4}, "shadows: is not a known key"),
    ],
    ids=["odd", "negative", "fraction", "nobody", "against", "seed", "attack", "unknown"],
)
def test_mistakes_in_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        section(**changes)
    assert "\n" not in str(refused.value)


def test_a_victim_that_is_not_there_is_one_sentence_and_leaves_nothing_behind(pipeline: Path, edit: Edit) -> None:
    edit({"membership.victims": {"standard": 0, "nobody": 0}})
    with pytest.raises(UserError, match=r"nobody\.safetensors: no such file"):
        stage.run()
    assert list(pipeline.glob("metrics/membership*")) == []


def test_the_projects_own_section_is_sound(inputs_only: Path) -> None:
    del inputs_only
    found = load_section("membership", MembershipSection)
    assert found.against in found.victims
    assert metrics.FALSE_POSITIVE_RATES == (0.001, 0.01)

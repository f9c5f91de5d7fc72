"""Metrics of extraction on cases small enough to count by hand; the detector; tables and result files.

Shapes: N images, C channel, H/W pixels, K classes.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.pgd import Pgd
from advmoe.core.errors import UserError
from advmoe.data.dataset import Split
from advmoe.runtime.machine import generator
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import PairedDifference, compare_paired
from advmoe.threats.extraction import metrics, prada, report, victims
from advmoe.threats.extraction.metrics import (
    EvaluationInputs,
    SurrogateAnswers,
    VictimAnswers,
    benign_user_cost,
    compute_metrics,
)
from advmoe.threats.extraction.oracle import format_answers
from advmoe.threats.extraction.prada import Prada
from advmoe.threats.extraction.report import CONTROL, Row
from advmoe.threats.extraction.victims import Victim

PGD = Pgd(kind="pgd", steps=3, step_size=0.5, restarts=1, loss="ce", targets=0)
CLASSES = 4
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
VICTIM = torch.tensor([0, 0, 1, 1, 2, 0, 0, 0])  # correct on the first five
COPY = torch.tensor([0, 0, 1, 2, 1, 0, 3, 0])  # agrees on five of eight, correct on four, shares two of three errors
CONTROL_COPY = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3])  # agrees on four, correct on seven
TRANSFERRED = torch.tensor([1, 0, 0, 1, 2, 1, 1, 1])  # fools two of the five; the other three are wrong anyway
CONTROL_TRANSFERRED = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])  # one of the five
SIGNS = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])  # one of the five
ATTACKED = torch.tensor([1, 1, 0, 0, 2, 1, 1, 1])  # four of the five


def make_inputs(labels: Tensor = LABELS) -> EvaluationInputs:
    images = torch.randint(0, 256, (len(labels), 1, 4, 4), generator=generator("exam"), dtype=torch.uint8)
    noise = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    return EvaluationInputs(Split(images, labels, torch.arange(len(labels))), noise, PGD, 0.1, 0, "float32")


def certain(classes_N: Tensor) -> Tensor:
    """Returns probabilities of 0.91 for the given classes and 0.03 for the others."""
    return functional.one_hot(classes_N, CLASSES).float() * 0.88 + 0.03


def make_victim_answers(predicted: Tensor = VICTIM, **changes: Any) -> VictimAnswers:
    attacked = torch.zeros(len(predicted), 1, 4, 4)
    made = VictimAnswers(certain(predicted), torch.tensor([0, 1, 2, 3, 0]), SIGNS, attacked, ATTACKED)
    return replace(made, **changes)


def make_surrogate_answers(predicted: Tensor = COPY, transferred: Tensor = TRANSFERRED) -> SurrogateAnswers:
    return SurrogateAnswers(
        log_probs=certain(predicted).double().log(),
        on_noise=torch.tensor([0, 1, 2, 0, 1]),
        on_attacked=torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]),
        robust=torch.tensor([1, 0, 1, 0, 0, 0, 0, 0]).bool(),
        transferred=transferred,
    )


def control() -> SurrogateAnswers:
    return make_surrogate_answers(CONTROL_COPY, CONTROL_TRANSFERRED)


def counted(number: Any) -> tuple[int, int]:
    """Of a share: how many of how many."""
    assert isinstance(number, Proportion)
    return number.correct, number.total


# ---- the numbers of the protocol


def test_every_share_of_the_protocol_by_hand() -> None:
    found = compute_metrics(make_surrogate_answers(), None, make_victim_answers(), make_inputs())
    assert {name: counted(number) for name, number in found.items() if isinstance(number, Proportion)} == {
        "task_acc": (4, 8),
        "fidelity": (5, 8),
        "noise_fidelity": (3, 5),
        "surrogate_robust_acc": (2, 8),
        "victim_acc_under_transfer": (3, 8),
        "robust_fidelity": (4, 8),
        "fidelity_on_victim_errors": (2, 3),
        "transfer_asr": (2, 5),
        "random_sign_asr": (1, 5),
        "white_box_asr": (4, 5),
    }
    assert found["acc_ratio"] == pytest.approx(4 / 5)


def test_images_that_the_victim_misclassifies_do_not_count_as_transfer_successes() -> None:
    """Five images that the victim gets right, and none of them is fooled: 0 %, not 3 of 8."""
    harmless = torch.tensor([0, 0, 1, 1, 2, 3, 2, 2])
    found = compute_metrics(make_surrogate_answers(transferred=harmless), None, make_victim_answers(), make_inputs())
    assert counted(found["transfer_asr"]) == (0, 5)
    assert counted(found["victim_acc_under_transfer"]) == (5, 8)
    fooled = torch.tensor([1, 1, 0, 0, 0, 2, 3, 3])
    found = compute_metrics(make_surrogate_answers(transferred=fooled), None, make_victim_answers(), make_inputs())
    assert counted(found["transfer_asr"]) == (5, 5)
    assert counted(found["victim_acc_under_transfer"]) == (3, 8)  # over all: the errors that it mends count too


def test_a_perfect_surrogate_shares_the_victims_errors() -> None:
    found = compute_metrics(make_surrogate_answers(VICTIM), None, make_victim_answers(), make_inputs())
    assert counted(found["fidelity"]) == (8, 8)
    assert counted(found["fidelity_on_victim_errors"]) == (3, 3)
    assert found["acc_ratio"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_a_surrogate_more_accurate_than_its_victim_has_no_higher_fidelity() -> None:
    found = compute_metrics(make_surrogate_answers(LABELS), None, make_victim_answers(), make_inputs())
    assert (counted(found["task_acc"]), counted(found["fidelity"])) == ((8, 8), (5, 8))
    assert counted(found["fidelity_on_victim_errors"]) == (0, 3)
    assert found["acc_ratio"] == pytest.approx(8 / 5)


def test_divergence_is_the_mean_over_images_from_victim_to_surrogate() -> None:
    theirs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    mine = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-9, 1e-9]]).double()
    inputs = make_inputs(LABELS[:2])
    known = VictimAnswers(theirs, torch.zeros(5), torch.zeros(2), None, None)
    copy = SurrogateAnswers(mine.log(), torch.zeros(5), None, torch.ones(2).bool(), torch.zeros(2))
    expected = (0.5 * math.log(0.5 / 0.25) + 1.0 * math.log(1.0 / 0.5)) / 2
    assert compute_metrics(copy, None, known, inputs)["kl"] == pytest.approx(expected, abs=1e-6)


def test_differences_to_the_control_are_paired_image_by_image() -> None:
    found = compute_metrics(make_surrogate_answers(), control(), make_victim_answers(), make_inputs())
    agrees, theirs = COPY == VICTIM, CONTROL_COPY == VICTIM
    assert found["d_fidelity"] == compare_paired(agrees, theirs, 0)
    assert (found["d_fidelity"].only_first, found["d_fidelity"].only_second) == (3, 2)
    assert found["d_fidelity"].difference == pytest.approx(1 / 8)
    assert found["d_task_acc"].difference == pytest.approx(-3 / 8)
    assert found["d_transfer_asr"].difference == pytest.approx(1 / 5)  # two of five against one of five
    assert (found["d_transfer_asr"].only_first, found["d_transfer_asr"].only_second) == (1, 0)


def test_the_control_is_not_compared_with_itself() -> None:
    found = compute_metrics(control(), None, make_victim_answers(), make_inputs())
    assert [name for name in found if name.startswith("d_")] == []
    twin = compute_metrics(control(), control(), make_victim_answers(), make_inputs())
    assert twin["d_fidelity"].difference == twin["d_transfer_asr"].difference == 0


def test_a_victim_that_is_never_wrong_has_no_errors_to_copy() -> None:
    found = compute_metrics(make_surrogate_answers(), None, make_victim_answers(LABELS), make_inputs())
    assert "fidelity_on_victim_errors" not in found
    assert counted(found["transfer_asr"])[1] == 8


def test_a_victim_that_is_always_wrong_cannot_be_fooled() -> None:
    found = compute_metrics(
        make_surrogate_answers(), control(), make_victim_answers((LABELS + 1) % CLASSES), make_inputs()
    )
    assert not {"transfer_asr", "random_sign_asr", "white_box_asr", "d_transfer_asr"} & found.keys()
    assert counted(found["fidelity_on_victim_errors"])[1] == 8
    assert math.isfinite(found["acc_ratio"])


def test_an_endpoint_has_no_white_box_metrics() -> None:
    found = compute_metrics(
        replace(make_surrogate_answers(), on_attacked=None),
        control(),
        make_victim_answers(attacked=None, on_attacked=None),
        make_inputs(),
    )
    assert not {"robust_fidelity", "white_box_asr"} & found.keys()
    assert "transfer_asr" in found


# ---- victim and surrogate side by side


class Linear(nn.Module):
    def __init__(self, seed: str) -> None:
        super().__init__()
        self.weight_KP = nn.Parameter(torch.randn(CLASSES, 16, generator=generator(seed)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - 0.5).flatten(1) @ self.weight_KP.T


def network(seed: str) -> tuple[Linear, Victim]:
    model = Linear(seed)
    return model, victims._network_victim(seed, "id", model, CLASSES)


def test_a_victim_that_is_its_own_surrogate_agrees_with_itself_everywhere() -> None:
    inputs = make_inputs(torch.arange(40) % CLASSES)
    model, victim = network("victim")
    known = metrics.victim_answers(victim, inputs)
    found = compute_metrics(metrics.surrogate_answers(model, victim, known, inputs), None, known, inputs)
    for name in ("fidelity", "noise_fidelity", "robust_fidelity"):
        assert found[name].accuracy == 1
    assert found["acc_ratio"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    # examples crafted on the victim itself are the upper bound
    assert found["transfer_asr"].correct >= found["white_box_asr"].correct - 1


def test_crafted_images_and_random_signs_lie_in_the_ball() -> None:
    inputs = make_inputs(torch.arange(12) % CLASSES)
    model, _ = network("victim")
    for made in (
        metrics.pgd_examples(model, inputs),
        metrics.transfer_examples(model, inputs),
        metrics._random_sign_examples(inputs),
    ):
        assert (made.cpu() - inputs.split.pixels()).abs().max() <= 0.1 + 1e-6
        assert made.min() >= 0
        assert made.max() <= 1
    assert torch.equal(metrics._random_sign_examples(inputs), metrics._random_sign_examples(inputs))
    assert (metrics._random_sign_examples(inputs) != inputs.split.pixels()).float().mean() > 0.9


def test_an_endpoint_receives_uint8_images() -> None:
    seen: list[Tensor] = []

    def ask(images_NCHW: Tensor) -> Tensor:
        seen.append(images_NCHW)
        return certain(torch.zeros(len(images_NCHW), dtype=torch.int64))

    victim, inputs = Victim("endpoint", "id", ask, None), make_inputs()
    known = metrics.victim_answers(victim, inputs)
    assert (known.attacked, known.on_attacked) == (None, None)
    copy = metrics.surrogate_answers(Linear("copy"), victim, known, inputs)
    assert copy.on_attacked is None
    assert {images.dtype for images in seen} == {torch.uint8}


def test_images_for_an_endpoint_stay_in_the_ball_after_rounding() -> None:
    """An epsilon of 25.5 levels allows 25, not 26: transfer must not be measured at a larger radius."""
    seen: list[Tensor] = []

    def ask(images_NCHW: Tensor) -> Tensor:
        seen.append(images_NCHW)
        return certain(torch.zeros(len(images_NCHW), dtype=torch.int64))

    inputs = make_inputs(torch.arange(40) % CLASSES)
    victim = Victim("endpoint", "id", ask, None)
    metrics.surrogate_answers(Linear("copy"), victim, metrics.victim_answers(victim, inputs), inputs)
    for images in (each for each in seen if len(each) == 40):
        assert (images.long() - inputs.split.images.long()).abs().max() <= 0.1 * 255


def test_the_cost_of_an_answer_mode_for_a_benign_user() -> None:
    thinks = torch.tensor([[0.6, 0.4, 0, 0], [0.3, 0.7, 0, 0], [0.26, 0.24, 0.25, 0.25]])
    labels = torch.tensor([0, 0, 0])
    soft, top1, rounded = (
        benign_user_cost(thinks, format_answers(thinks, mode), labels) for mode in ("soft", "top1", "rounded-1")
    )
    assert (counted(soft["honest_acc"]), soft["honest_distance"]) == ((2, 3), 0)
    assert counted(top1["honest_acc"]) == (2, 3)
    assert top1["honest_distance"] == pytest.approx((0.4 + 0.3 + 0.74) / 3, abs=1e-6)
    # 0.26 and 0.24 become 0.3 and 0.2, 0.25 the even 0.2
    assert rounded["honest_distance"] == pytest.approx(0.09, abs=0.06)
    assert rounded["honest_distance"] < top1["honest_distance"]


def test_rounding_may_cost_accuracy_where_two_classes_become_equal() -> None:
    thinks = torch.tensor([[0.49, 0.51, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0]])
    labels = torch.tensor([1, 1])
    assert counted(benign_user_cost(thinks, thinks, labels)["honest_acc"]) == (2, 2)
    told = format_answers(thinks, "rounded-1")
    assert counted(benign_user_cost(thinks, told, labels)["honest_acc"]) == (1, 2)
    assert benign_user_cost(thinks, told, labels)["honest_distance"] == pytest.approx(0.005, abs=1e-6)


# ---- PRADA

DETECTOR = Prada(delta=0.9, least=20, every=10)


def benign(count: int, side: int = 8) -> Tensor:
    """Independent images, whose distances are near normal."""
    drawn = torch.randn(count, 1, side, side, generator=generator("benign")) * 40 + 128
    return drawn.round().clamp(0, 255).to(torch.uint8)


def jbda_queries(seeds: int, doublings: int) -> Tensor:
    """Returns queries like those of JBDA: all earlier images, moved a little."""
    images, stream = benign(seeds).long(), generator("thief")
    for _ in range(doublings):
        signs = torch.randint(0, 2, images.shape, generator=stream) * 2 - 1
        images = torch.cat([images, (images + 10 * signs).clamp(0, 255)])
    return images.to(torch.uint8)


def zeros(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.int64)


def drawn(count: int, *name: object) -> Tensor:
    """Normal distances around 10."""
    return 10 + torch.randn(count, generator=generator(*name)).double()


def test_normal_distances_pass_the_test_and_two_clusters_do_not() -> None:
    near, far = ((drawn(150, name) - 10) * 0.1 + place for name, place in (("near", 1), ("far", 10)))
    assert prada.shapiro_wilk_statistic(drawn(300, "normality")) > 0.98
    assert prada.shapiro_wilk_statistic(torch.cat([near, far])) < 0.75


def test_equal_distances_are_not_normal() -> None:
    assert prada.shapiro_wilk_statistic(torch.ones(50)) == 0
    assert prada.shapiro_wilk_statistic(torch.zeros(3)) == 0


def test_outliers_beyond_three_deviations_are_left_out() -> None:
    """Of twenty equal values and one other, that one lies sqrt(20) = 4.5 deviations from the mean; of eight, 2.8."""
    assert prada.remove_outliers([1.0] * 20 + [7.0]).tolist() == [1.0] * 20
    assert prada.remove_outliers([1.0] * 8 + [7.0]).tolist() == [1.0] * 8 + [7.0]
    # exactly three deviations with the divisor N: nine equal values and one other
    assert prada.remove_outliers([0.0] * 9 + [10.0]).tolist() == [0.0] * 9 + [10.0]
    # two of nineteen: sqrt(19 / 2) = 3.08 deviations with the divisor N, exactly three with N - 1
    assert prada.remove_outliers([3.0] * 17 + [0.0, 6.0]).tolist() == [3.0] * 17
    normal = drawn(300, "outliers").clamp(8, 12)
    assert torch.equal(prada.remove_outliers([*normal.tolist(), 1000.0]), normal)


def test_only_the_latest_distances_of_a_long_history_are_tested() -> None:
    new = drawn(prada.MAX_SHAPIRO_VALUES, "history").clamp(8, 12)
    assert torch.equal(prada.remove_outliers([0.0, 100.0] * 500 + new.tolist()), new)


def test_a_single_distance_is_no_outlier() -> None:
    assert prada.remove_outliers([2.5]).tolist() == [2.5]


def test_benign_queries_raise_no_alarm_and_jbda_queries_do() -> None:
    assert prada.queries_until_alarm(benign(300), zeros(benign(300)), DETECTOR) is None
    alarm = prada.queries_until_alarm(jbda_queries(25, 3), zeros(jbda_queries(25, 3)), DETECTOR)
    assert alarm is not None
    assert 25 < alarm <= 200
    assert alarm % DETECTOR.every == 0


def test_the_alarm_depends_on_the_order_of_the_queries() -> None:
    moved = jbda_queries(25, 3)[25:]
    early = prada.queries_until_alarm(torch.cat([jbda_queries(25, 3), benign(100)]), zeros(torch.empty(300)), DETECTOR)
    late = prada.queries_until_alarm(torch.cat([benign(125), moved]), zeros(torch.empty(300)), DETECTOR)
    assert early is not None
    assert late is not None
    assert late > 120 > early


def test_the_first_query_of_a_class_has_no_distance() -> None:
    images = benign(1).repeat(40, 1, 1, 1)
    assert prada.queries_until_alarm(images, torch.arange(40), Prada(delta=0.9, least=3, every=1)) is None


def test_a_detector_that_tests_after_every_query_counts_distances() -> None:
    images = benign(1).repeat(60, 1, 1, 1)
    assert (
        prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=3, every=1)) == 4
    )  # three equal distances
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=50, every=1)) == 51


def test_only_queries_of_the_same_answered_class_are_compared() -> None:
    """Equal images, two at a time of one class: every second query has a distance, 0, to the one before."""
    images = benign(1).repeat(40, 1, 1, 1)
    pairs = torch.arange(40) // 2
    assert prada.queries_until_alarm(images, pairs, Prada(delta=0.9, least=5, every=2)) == 10
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=5, every=2)) == 6


def test_no_alarm_before_enough_distances_or_between_two_tests() -> None:
    images = benign(1).repeat(60, 1, 1, 1)
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=50, every=3)) == 51
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=51, every=3)) == 54
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=50, every=25)) is None
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=40, every=25)) == 50


def on_a_line(places: Sequence[float]) -> Tensor:
    """Images of one pixel row that differ in one direction only; places in levels."""
    images = torch.zeros(len(places), 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(places).to(torch.uint8)
    return images


def test_distances_count_towards_the_least_after_outliers_are_removed() -> None:
    """Twenty images that are all the same, then one far away: of 20 distances one is an outlier."""
    images = on_a_line([0.0] * 20 + [200.0])
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=19, every=21)) == 21
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=20, every=21)) is None


@pytest.mark.parametrize(("least", "alarm"), [(40, 48), (60, 72), (80, 84), (100, 108)], ids=str)
def test_a_detector_that_requires_more_distances_raises_the_alarm_later(least: int, alarm: int) -> None:
    images = benign(1).repeat(120, 1, 1, 1)
    assert prada.queries_until_alarm(images, zeros(images), Prada(delta=0.9, least=least, every=12)) == alarm


def test_the_growing_set_by_hand() -> None:
    """Algorithm 3 of the paper: mean less deviation (divisor N) of 0 and the distances that made the set grow."""
    growing = prada._GrowingSet()
    assert (growing.distances, growing.threshold) == ([0.0], 0)
    steps = (  # a place, its distance, and the threshold afterwards
        (0.0, None, 0.0),
        (1.0, 1.0, 0.0),  # of 0 and 1 mean and deviation are both 1/2
        (0.5, 0.5, 0.5 - math.sqrt(1 / 6)),  # 0, 1, 1/2: variance 1/6
        (0.55, 0.05, 0.5 - math.sqrt(1 / 6)),  # too near: stays out
        (0.9, 0.1, 0.5 - math.sqrt(1 / 6)),  # 0, 1, 0.5, 0.1 would be 0.4 - 0.394: it never falls
        (0.95, 0.05, 0.5 - math.sqrt(1 / 6)),
        (3.0, 2.0, 0.5 - math.sqrt(1 / 6)),  # 0, 1, 0.5, 0.1, 2: 0.72 - 0.736
    )
    for place, distance, threshold in steps:
        told = growing.distance(torch.tensor([place]))
        assert told == (None if distance is None else pytest.approx(distance, abs=1e-6))
        assert growing.threshold == pytest.approx(threshold, abs=1e-6)
    assert [float(member) for member in growing.members] == pytest.approx([0.0, 1.0, 0.5, 0.9, 3.0])
    assert growing.distances == pytest.approx([0.0, 1.0, 0.5, 0.1, 2.0], abs=1e-6)
    # the image that was not added is no neighbour
    assert growing.distance(torch.tensor([0.55])) == pytest.approx(0.05, abs=1e-6)


def test_the_threshold_of_a_growing_set_never_falls() -> None:
    """Near images that just make it into the set would pull the mean less the deviation down."""
    growing, thresholds, falls = prada._GrowingSet(), [], 0
    growing.distance(torch.zeros(100))
    for number, direction in enumerate(torch.eye(100)):  # the nearest member is the one at the origin
        growing.distance(direction * (1.0 if number < 30 else 1.01 * growing.threshold))
        thresholds.append(growing.threshold)
        spread = torch.tensor(growing.distances)
        falls += float(spread.mean() - spread.std(correction=0)) < growing.threshold - 1e-6
    assert len(growing.members) == 101
    assert thresholds == sorted(thresholds)
    assert thresholds[0] == 0 < thresholds[-1]
    assert falls > 10


def test_a_repeated_query_is_not_added_to_the_growing_set() -> None:
    growing = prada._GrowingSet()
    for place, members in ((0.0, 1), (0.0, 1), (1.0, 2), (1.0, 2), (0.0, 2)):
        growing.distance(torch.tensor([place]))
        assert len(growing.members) == members
    assert growing.distances == [0.0, 1.0]
    assert growing.threshold == 0


def test_a_distance_equal_to_the_threshold_is_not_added() -> None:
    growing = prada._GrowingSet()
    growing.distance(torch.tensor([0.0]))
    growing.threshold = 0.5
    assert growing.distance(torch.tensor([0.5])) == 0.5
    assert len(growing.members) == 1
    growing.distance(torch.tensor([0.75]))
    assert len(growing.members) == 2


def test_distances_are_in_pixels_from_0_to_1() -> None:
    """From black to white in 16 pixels is 4."""
    growing = prada._GrowingSet()
    growing.distance(torch.zeros(16))
    assert growing.distance(torch.ones(16)) == pytest.approx(4)


# ---- reports


def make_row(answers: str = "soft", budget: int = 100, added: int = 0, fidelity: int = 6, **changes: Any) -> Row:
    is_control = answers == CONTROL
    found: dict[str, Any] = {
        "task_acc": Proportion.from_counts(5, 8),
        "acc_ratio": 0.9,
        "fidelity": Proportion.from_counts(fidelity, 8),
        "surrogate_robust_acc": Proportion.from_counts(1, 8),
        "robust_fidelity": Proportion.from_counts(2, 8),
        "transfer_asr": Proportion.from_counts(2, 5),
        "random_sign_asr": Proportion.from_counts(1, 5),
        "white_box_asr": Proportion.from_counts(4, 5),
        "kl": 0.25,
    }
    amounts: dict[str, Any] = {}
    if not is_control:
        found["d_fidelity"] = compare_paired(torch.arange(8) < fidelity, torch.arange(8) < 4, 0)
        amounts = {
            "queries_used": budget,
            "sha256": "0" * 64,
            "alarm_after": None,
            "honest_alarm_after": 50,
            "honest_queries": 360,
            "honest_acc": Proportion.from_counts(7, 8),
            "honest_distance": 0.125,
        }
    content: dict[str, Any] = {
        "victim": "mixture",
        "answers": answers,
        "surrogate": "same",
        "budget": budget,
        "seed_offset": added,
    }
    return Row(**(content | changes | {"metrics": found, "query_stats": amounts}))


def make_rows(seeds: Sequence[int] = (0,)) -> list[Row]:
    rows = []
    for added in seeds:
        rows.append(make_row(CONTROL, 0, added, 4))
        rows += [make_row("soft", 50, added, 5), make_row("soft", 100, added, 6 + added), make_row("top1", 100, added)]
    return rows


def test_rows_of_different_seeds_are_one_group() -> None:
    found = report.group_over_seeds(make_rows((0, 1)))
    assert list(found) == [
        ("mixture", CONTROL, "same", 0),
        ("mixture", "soft", "same", 50),
        ("mixture", "soft", "same", 100),
        ("mixture", "top1", "same", 100),
    ]
    assert [[row.seed_offset for row in members] for members in found.values()] == [[0, 1]] * 4


def test_the_summary_is_the_mean_over_seeds() -> None:
    found = report.mean_metrics(make_rows((0, 1)))
    assert found["mixture"]["soft"]["same"]["100"]["fidelity"] == pytest.approx(6.5 / 8)
    assert found["mixture"][CONTROL]["same"]["0"]["fidelity"] == 0.5
    assert "d_fidelity" not in found["mixture"][CONTROL]["same"]["0"]
    assert found["mixture"]["soft"]["same"]["50"]["kl"] == 0.25


def test_the_curve_starts_with_the_control_at_no_queries() -> None:
    lines = report.curve(make_rows())
    assert [line["queries"] for line in lines] == [0, 50, 100]
    soft = [line["fidelity mixture soft same"] for line in lines]
    assert soft == [0.5, 0.625, 0.75]
    assert [line["fidelity mixture top1 same"] for line in lines] == [0.5, "", 0.75]
    assert [line["d_fidelity mixture soft same"] for line in lines] == ["", 0.125, 0.25]
    assert len({tuple(line) for line in lines}) == 1  # the same columns in every line
    assert not any(CONTROL in column.split() for column in lines[0])


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows, about = make_rows((0, 1)), {"attack": "jbda", "epsilon": 0.1, "images": 8}
    report.write(rows, about, tmp_path / "head.json", tmp_path / "runs.json", tmp_path / "curve.csv")
    read, images = report.read(tmp_path / "runs.json")
    assert (read, images) == (rows, 8)
    assert read[1].query_stats["alarm_after"] is None
    assert isinstance(read[1].metrics["d_fidelity"], PairedDifference)
    head = json.loads((tmp_path / "head.json").read_text())
    assert (head["schema_version"], head["attack"], head["epsilon"]) == (report.SCHEMA, "jbda", 0.1)
    assert head["mixture"] == report.mean_metrics(rows)["mixture"]
    with (tmp_path / "curve.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["queries"] for line in lines] == ["0", "50", "100"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema_version": 99, "runs": []}', '{"schema_version": 1}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "runs.json").write_text(content)
    with pytest.raises(UserError, match=r"runs\.json: not a result of this version"):
        report.read(tmp_path / "runs.json")


def flat(text: str) -> str:
    return " ".join("".join(sign if sign.isascii() and sign.isprintable() else " " for sign in text).split())


def test_tables_show_the_control_and_the_surrogates(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("extract@jbda", make_rows(), 8)
    said = capsys.readouterr().out
    (line,) = [flat(each) for each in said.splitlines() if f" {CONTROL} " in each and "same" in each]
    assert line.startswith(f"mixture {CONTROL} same 0 62.5 ")
    assert "50.0 [" in line
    assert "75.0 [" in said  # fidelity of 100 soft answers,
    assert "(+25.0)" in said  # and how far that is beyond the control
    shown = flat(said)
    assert "one seed, 95 % intervals over images" in shown
    assert "never in 100" in shown  # the alarm for the attack
    assert "50 of 360" in shown  # the alarm for a benign user
    assert f"answers '{CONTROL}': the control" in shown


def test_tables_of_several_seeds_show_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("extract@jbda", make_rows((0, 1)), 8)
    said = flat(capsys.readouterr().out)
    assert "2 seeds, mean (lowest to highest)" in said
    members = report.group_over_seeds(make_rows((0, 1)))["mixture", "soft", "same", 100]
    assert report._cell(members, "fidelity") == "81.2 (75.0 to 87.5) (+31.2)"


def test_the_strongest_surrogate_of_the_transfer_table_is_never_the_control() -> None:
    rows = make_rows()
    rows[0].metrics["transfer_asr"] = Proportion.from_counts(5, 5)  # the control's
    rows[3].metrics["transfer_asr"] = Proportion.from_counts(3, 5)
    _, ((victim, signs, free, best, ceiling, which),) = report._transfer_table(rows)
    assert (victim, which) == ("mixture", "top1, same, 100 queries (best of 3)")
    assert [text.split()[0] for text in (signs, free, best, ceiling)] == ["20.0", "100.0", "60.0", "80.0"]


@pytest.mark.parametrize(
    ("after", "queries", "expected"),
    [(None, 360, "never in 360"), (60, 1600, "60 of 1600"), (50, 50, "50 of 50")],
    ids=["never", "early", "at the end"],
)
def test_an_alarm_is_shown_with_the_number_of_queries(after: int | None, queries: int, expected: str) -> None:
    assert report._alarm_cell(after, queries) == expected


def test_the_defence_table_has_one_line_for_each_victim_and_mode_at_its_largest_budget() -> None:
    rows = [*make_rows((0, 1)), make_row("soft", 100, victim="standard")]
    for row in rows:
        if row.answers == "soft" and row.budget == 100:
            row.query_stats["alarm_after"] = 60
    titles, lines = report._defence_table(rows)
    assert titles[-2:] == ["alarm, attack", "alarm, benign"]
    assert [[line[0], line[1], *line[3:]] for line in lines] == [
        ["mixture", "soft", "0.125", "60 of 100", "50 of 360"],
        ["mixture", "top1", "0.125", "never in 100", "50 of 360"],
        ["standard", "soft", "0.125", "60 of 100", "50 of 360"],
    ]
    assert all(line[2].startswith("87.5 ") for line in lines)


def test_the_summary_line_names_the_run_and_its_metrics() -> None:
    said = report.summary_line(make_row())
    assert said.startswith("mixture, soft, same, 100 queries, seed + 0: accuracy 62.5 ")
    assert "fidelity 75.0 " in said

"""What was stolen, by cases small enough to count on fingers; the detector; tables and files of results.

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
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import PairedDifference, compare
from advmoe.threats.extraction import metrics, prada, report, victims
from advmoe.threats.extraction.metrics import Exam, SurrogateAnswers, VictimAnswers, cost_to_honest, numbers
from advmoe.threats.extraction.oracle import told_as
from advmoe.threats.extraction.prada import Prada
from advmoe.threats.extraction.report import CONTROL, Row
from advmoe.threats.extraction.victims import Victim

PGD = Pgd(kind="pgd", steps=3, step_size=0.5, restarts=1, loss="ce", targets=0)
CLASSES = 4
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
VICTIM = torch.tensor([0, 0, 1, 1, 2, 0, 0, 0])  # right about the first five
COPY = torch.tensor([0, 0, 1, 2, 1, 0, 3, 0])  # agrees on five of eight, right about four, copies two of three errors
CONTROL_COPY = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3])  # agrees on four, right about seven
TRANSFERRED = torch.tensor([1, 0, 0, 1, 2, 1, 1, 1])  # fools two of the five; the other three are wrong anyway
CONTROL_TRANSFERRED = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])  # one of the five
SIGNS = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])  # one of the five
ATTACKED = torch.tensor([1, 1, 0, 0, 2, 1, 1, 1])  # four of the five


def make_exam(labels: Tensor = LABELS) -> Exam:
    images = torch.randint(0, 256, (len(labels), 1, 4, 4), generator=generator("exam"), dtype=torch.uint8)
    noise = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    return Exam(Split(images, labels, torch.arange(len(labels))), noise, PGD, 0.1, 0, "float32")


def certain(classes_N: Tensor) -> Tensor:
    """Probabilities that leave a little for the others."""
    return functional.one_hot(classes_N, CLASSES).float() * 0.88 + 0.03


def make_sheet(predicted: Tensor = VICTIM, **changes: Any) -> VictimAnswers:
    attacked = torch.zeros(len(predicted), 1, 4, 4)
    made = VictimAnswers(certain(predicted), torch.tensor([0, 1, 2, 3, 0]), SIGNS, attacked, ATTACKED)
    return replace(made, **changes)


def make_copy(predicted: Tensor = COPY, transferred: Tensor = TRANSFERRED) -> SurrogateAnswers:
    return SurrogateAnswers(
        log_probs=certain(predicted).double().log(),
        on_noise=torch.tensor([0, 1, 2, 0, 1]),
        on_attacked=torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]),
        robust=torch.tensor([1, 0, 1, 0, 0, 0, 0, 0]).bool(),
        transferred=transferred,
    )


def control() -> SurrogateAnswers:
    return make_copy(CONTROL_COPY, CONTROL_TRANSFERRED)


def counted(number: Any) -> tuple[int, int]:
    """Of a share: how many of how many."""
    assert isinstance(number, Share)
    return number.correct, number.total


# ---- the numbers of the protocol


def test_every_share_of_the_protocol_by_hand() -> None:
    found = numbers(make_copy(), None, make_sheet(), make_exam())
    assert {name: counted(number) for name, number in found.items() if isinstance(number, Share)} == {
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


def test_a_victim_that_is_wrong_everywhere_else_makes_no_transfer_succeed() -> None:
    """Five images that the victim gets right, and none of them is fooled: 0 %, not 3 of 8."""
    harmless = torch.tensor([0, 0, 1, 1, 2, 3, 2, 2])
    found = numbers(make_copy(transferred=harmless), None, make_sheet(), make_exam())
    assert counted(found["transfer_asr"]) == (0, 5)
    assert counted(found["victim_acc_under_transfer"]) == (5, 8)
    fooled = torch.tensor([1, 1, 0, 0, 0, 2, 3, 3])
    found = numbers(make_copy(transferred=fooled), None, make_sheet(), make_exam())
    assert counted(found["transfer_asr"]) == (5, 5)
    assert counted(found["victim_acc_under_transfer"]) == (3, 8)  # over all: the errors that it mends count too


def test_a_perfect_copy_shares_the_victims_errors() -> None:
    found = numbers(make_copy(VICTIM), None, make_sheet(), make_exam())
    assert counted(found["fidelity"]) == (8, 8)
    assert counted(found["fidelity_on_victim_errors"]) == (3, 3)
    assert found["acc_ratio"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_a_better_pupil_than_its_teacher_is_no_better_copy() -> None:
    found = numbers(make_copy(LABELS), None, make_sheet(), make_exam())
    assert (counted(found["task_acc"]), counted(found["fidelity"])) == ((8, 8), (5, 8))
    assert counted(found["fidelity_on_victim_errors"]) == (0, 3)
    assert found["acc_ratio"] == pytest.approx(8 / 5)


def test_divergence_is_the_mean_over_images_from_victim_to_surrogate() -> None:
    theirs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    mine = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-9, 1e-9]]).double()
    exam = make_exam(LABELS[:2])
    known = VictimAnswers(theirs, torch.zeros(5), torch.zeros(2), None, None)
    copy = SurrogateAnswers(mine.log(), torch.zeros(5), None, torch.ones(2).bool(), torch.zeros(2))
    expected = (0.5 * math.log(0.5 / 0.25) + 1.0 * math.log(1.0 / 0.5)) / 2
    assert numbers(copy, None, known, exam)["kl"] == pytest.approx(expected, abs=1e-6)


def test_differences_to_the_control_are_paired_image_by_image() -> None:
    found = numbers(make_copy(), control(), make_sheet(), make_exam())
    agrees, theirs = COPY == VICTIM, CONTROL_COPY == VICTIM
    assert found["d_fidelity"] == compare(agrees, theirs, 0)
    assert (found["d_fidelity"].only_first, found["d_fidelity"].only_second) == (3, 2)
    assert found["d_fidelity"].difference == pytest.approx(1 / 8)
    assert found["d_task_acc"].difference == pytest.approx(-3 / 8)
    assert found["d_transfer_asr"].difference == pytest.approx(1 / 5)  # two of five against one of five
    assert (found["d_transfer_asr"].only_first, found["d_transfer_asr"].only_second) == (1, 0)


def test_the_control_is_not_compared_with_itself() -> None:
    found = numbers(control(), None, make_sheet(), make_exam())
    assert [name for name in found if name.startswith("d_")] == []
    twin = numbers(control(), control(), make_sheet(), make_exam())
    assert twin["d_fidelity"].difference == twin["d_transfer_asr"].difference == 0


def test_a_victim_that_is_never_wrong_has_no_errors_to_copy() -> None:
    found = numbers(make_copy(), None, make_sheet(LABELS), make_exam())
    assert "fidelity_on_victim_errors" not in found
    assert counted(found["transfer_asr"])[1] == 8


def test_a_victim_that_is_always_wrong_cannot_be_fooled() -> None:
    found = numbers(make_copy(), control(), make_sheet((LABELS + 1) % CLASSES), make_exam())
    assert not {"transfer_asr", "random_sign_asr", "white_box_asr", "d_transfer_asr"} & found.keys()
    assert counted(found["fidelity_on_victim_errors"])[1] == 8
    assert math.isfinite(found["acc_ratio"])


def test_an_endpoint_has_no_white_box_columns() -> None:
    found = numbers(
        replace(make_copy(), on_attacked=None), control(), make_sheet(attacked=None, on_attacked=None), make_exam()
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
    return model, victims._network(seed, "id", model, CLASSES)


def test_a_victim_that_is_its_own_surrogate_agrees_with_itself_everywhere() -> None:
    exam = make_exam(torch.arange(40) % CLASSES)
    model, victim = network("victim")
    known = metrics.victim_answers(victim, exam)
    found = numbers(metrics.examine(model, victim, known, exam), None, known, exam)
    for name in ("fidelity", "noise_fidelity", "robust_fidelity"):
        assert found[name].accuracy == 1
    assert found["acc_ratio"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    # whoever crafts on the victim itself is the ceiling
    assert found["transfer_asr"].correct >= found["white_box_asr"].correct - 1


def test_crafted_images_and_random_signs_lie_in_the_ball() -> None:
    exam = make_exam(torch.arange(12) % CLASSES)
    model, _ = network("victim")
    for made in (metrics.broken(model, exam), metrics.to_transfer(model, exam), metrics._signs(exam)):
        assert (made.cpu() - exam.split.pixels()).abs().max() <= 0.1 + 1e-6
        assert made.min() >= 0
        assert made.max() <= 1
    assert torch.equal(metrics._signs(exam), metrics._signs(exam))
    assert (metrics._signs(exam) != exam.split.pixels()).float().mean() > 0.9


def test_an_endpoint_is_asked_in_whole_levels() -> None:
    seen: list[Tensor] = []

    def ask(images_NCHW: Tensor) -> Tensor:
        seen.append(images_NCHW)
        return certain(torch.zeros(len(images_NCHW), dtype=torch.int64))

    victim, exam = Victim("endpoint", "id", ask, None), make_exam()
    known = metrics.victim_answers(victim, exam)
    assert (known.attacked, known.on_attacked) == (None, None)
    copy = metrics.examine(Linear("copy"), victim, known, exam)
    assert copy.on_attacked is None
    assert {images.dtype for images in seen} == {torch.uint8}


def test_images_for_an_endpoint_stay_in_the_ball_after_rounding() -> None:
    """An epsilon of 25.5 levels allows 25, not 26: transfer must not be measured at a larger radius."""
    seen: list[Tensor] = []

    def ask(images_NCHW: Tensor) -> Tensor:
        seen.append(images_NCHW)
        return certain(torch.zeros(len(images_NCHW), dtype=torch.int64))

    exam = make_exam(torch.arange(40) % CLASSES)
    victim = Victim("endpoint", "id", ask, None)
    metrics.examine(Linear("copy"), victim, metrics.victim_answers(victim, exam), exam)
    for images in (each for each in seen if len(each) == 40):
        assert (images.long() - exam.split.images.long()).abs().max() <= 0.1 * 255


def test_what_an_answer_mode_costs_an_honest_user() -> None:
    thinks = torch.tensor([[0.6, 0.4, 0, 0], [0.3, 0.7, 0, 0], [0.26, 0.24, 0.25, 0.25]])
    labels = torch.tensor([0, 0, 0])
    soft, top1, rounded = (
        cost_to_honest(thinks, told_as(thinks, mode), labels) for mode in ("soft", "top1", "rounded-1")
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
    assert counted(cost_to_honest(thinks, thinks, labels)["honest_acc"]) == (2, 2)
    told = told_as(thinks, "rounded-1")
    assert counted(cost_to_honest(thinks, told, labels)["honest_acc"]) == (1, 2)
    assert cost_to_honest(thinks, told, labels)["honest_distance"] == pytest.approx(0.005, abs=1e-6)


# ---- PRADA

DETECTOR = Prada(delta=0.9, least=20, every=10)


def benign(count: int, side: int = 8) -> Tensor:
    """Independent images, whose distances are near normal."""
    drawn = torch.randn(count, 1, side, side, generator=generator("benign")) * 40 + 128
    return drawn.round().clamp(0, 255).to(torch.uint8)


def thief(seeds: int, doublings: int) -> Tensor:
    """As JBDA asks: every known image, moved a little."""
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
    assert prada.normality(drawn(300, "normality")) > 0.98
    assert prada.normality(torch.cat([near, far])) < 0.75


def test_equal_distances_are_not_normal() -> None:
    assert prada.normality(torch.ones(50)) == 0
    assert prada.normality(torch.zeros(3)) == 0


def test_outliers_beyond_three_deviations_are_left_out() -> None:
    """Of twenty equal values and one other, that one lies sqrt(20) = 4.5 deviations from the mean; of eight, 2.8."""
    assert prada.without_outliers([1.0] * 20 + [7.0]).tolist() == [1.0] * 20
    assert prada.without_outliers([1.0] * 8 + [7.0]).tolist() == [1.0] * 8 + [7.0]
    # exactly three deviations with the divisor N: nine equal values and one other
    assert prada.without_outliers([0.0] * 9 + [10.0]).tolist() == [0.0] * 9 + [10.0]
    # two of nineteen: sqrt(19 / 2) = 3.08 deviations with the divisor N, exactly three with N - 1
    assert prada.without_outliers([3.0] * 17 + [0.0, 6.0]).tolist() == [3.0] * 17
    normal = drawn(300, "outliers").clamp(8, 12)
    assert torch.equal(prada.without_outliers([*normal.tolist(), 1000.0]), normal)


def test_a_long_history_is_looked_at_from_its_end() -> None:
    new = drawn(prada.MOST, "history").clamp(8, 12)
    assert torch.equal(prada.without_outliers([0.0, 100.0] * 500 + new.tolist()), new)


def test_a_single_distance_is_no_outlier() -> None:
    assert prada.without_outliers([2.5]).tolist() == [2.5]


def test_an_honest_user_raises_no_alarm_and_a_thief_does() -> None:
    assert prada.alarm_after(benign(300), zeros(benign(300)), DETECTOR) is None
    alarm = prada.alarm_after(thief(25, 3), zeros(thief(25, 3)), DETECTOR)
    assert alarm is not None
    assert 25 < alarm <= 200
    assert alarm % DETECTOR.every == 0


def test_the_alarm_depends_on_the_order_of_the_queries() -> None:
    moved = thief(25, 3)[25:]
    early = prada.alarm_after(torch.cat([thief(25, 3), benign(100)]), zeros(torch.empty(300)), DETECTOR)
    late = prada.alarm_after(torch.cat([benign(125), moved]), zeros(torch.empty(300)), DETECTOR)
    assert early is not None
    assert late is not None
    assert late > 120 > early


def test_queries_of_classes_that_were_never_answered_before_are_compared_with_nothing() -> None:
    images = benign(1).repeat(40, 1, 1, 1)
    assert prada.alarm_after(images, torch.arange(40), Prada(delta=0.9, least=3, every=1)) is None


def test_a_detector_that_looks_at_every_query_counts_its_distances() -> None:
    images = benign(1).repeat(60, 1, 1, 1)
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=3, every=1)) == 4  # three equal distances
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=50, every=1)) == 51


def test_only_queries_of_the_same_answered_class_are_compared() -> None:
    """Equal images, two at a time of one class: every second query has a distance, 0, to the one before."""
    images = benign(1).repeat(40, 1, 1, 1)
    pairs = torch.arange(40) // 2
    assert prada.alarm_after(images, pairs, Prada(delta=0.9, least=5, every=2)) == 10
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=5, every=2)) == 6


def test_no_alarm_before_so_many_distances_and_between_two_looks() -> None:
    images = benign(1).repeat(60, 1, 1, 1)
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=50, every=3)) == 51
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=51, every=3)) == 54
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=50, every=25)) is None
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=40, every=25)) == 50


def on_a_line(places: Sequence[float]) -> Tensor:
    """Images of one pixel row that differ in one direction only; places in levels."""
    images = torch.zeros(len(places), 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(places).to(torch.uint8)
    return images


def test_distances_count_towards_the_least_after_outliers_are_removed() -> None:
    """Twenty images that are all the same, then one far away: of 20 distances one is an outlier."""
    images = on_a_line([0.0] * 20 + [200.0])
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=19, every=21)) == 21
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=20, every=21)) is None


@pytest.mark.parametrize(("least", "alarm"), [(40, 48), (60, 72), (80, 84), (100, 108)], ids=str)
def test_a_detector_that_asks_for_more_distances_raises_the_alarm_later(least: int, alarm: int) -> None:
    images = benign(1).repeat(120, 1, 1, 1)
    assert prada.alarm_after(images, zeros(images), Prada(delta=0.9, least=least, every=12)) == alarm


def test_the_growing_set_by_hand() -> None:
    """Algorithm 3 of the paper: mean less deviation (divisor N) of 0 and the distances that made the set grow."""
    growing = prada._Growing()
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
    # the one that was left out is nobody's neighbour
    assert growing.distance(torch.tensor([0.55])) == pytest.approx(0.05, abs=1e-6)


def test_the_threshold_of_a_growing_set_never_falls() -> None:
    """Near images that just make it into the set would pull the mean less the deviation down."""
    growing, thresholds, falls = prada._Growing(), [], 0
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


def test_an_image_that_was_asked_before_does_not_enter_the_growing_set() -> None:
    growing = prada._Growing()
    for place, members in ((0.0, 1), (0.0, 1), (1.0, 2), (1.0, 2), (0.0, 2)):
        growing.distance(torch.tensor([place]))
        assert len(growing.members) == members
    assert growing.distances == [0.0, 1.0]
    assert growing.threshold == 0


def test_what_lies_exactly_at_the_threshold_stays_out() -> None:
    growing = prada._Growing()
    growing.distance(torch.tensor([0.0]))
    growing.threshold = 0.5
    assert growing.distance(torch.tensor([0.5])) == 0.5
    assert len(growing.members) == 1
    growing.distance(torch.tensor([0.75]))
    assert len(growing.members) == 2


def test_distances_are_in_pixels_from_0_to_1() -> None:
    """From black to white in 16 pixels is 4."""
    growing = prada._Growing()
    growing.distance(torch.zeros(16))
    assert growing.distance(torch.ones(16)) == pytest.approx(4)


# ---- reports


def make_row(answers: str = "soft", budget: int = 100, added: int = 0, fidelity: int = 6, **changes: Any) -> Row:
    is_control = answers == CONTROL
    found: dict[str, Any] = {
        "task_acc": Share.counted(5, 8),
        "acc_ratio": 0.9,
        "fidelity": Share.counted(fidelity, 8),
        "surrogate_robust_acc": Share.counted(1, 8),
        "robust_fidelity": Share.counted(2, 8),
        "transfer_asr": Share.counted(2, 5),
        "random_sign_asr": Share.counted(1, 5),
        "white_box_asr": Share.counted(4, 5),
        "kl": 0.25,
    }
    amounts: dict[str, Any] = {}
    if not is_control:
        found["d_fidelity"] = compare(torch.arange(8) < fidelity, torch.arange(8) < 4, 0)
        amounts = {
            "queries_used": budget,
            "sha256": "0" * 64,
            "alarm_after": None,
            "honest_alarm_after": 50,
            "honest_queries": 360,
            "honest_acc": Share.counted(7, 8),
            "honest_distance": 0.125,
        }
    content: dict[str, Any] = {
        "victim": "mixture",
        "answers": answers,
        "surrogate": "same",
        "budget": budget,
        "added": added,
    }
    return Row(**(content | changes | {"found": found, "amounts": amounts}))


def make_rows(seeds: Sequence[int] = (0,)) -> list[Row]:
    rows = []
    for added in seeds:
        rows.append(make_row(CONTROL, 0, added, 4))
        rows += [make_row("soft", 50, added, 5), make_row("soft", 100, added, 6 + added), make_row("top1", 100, added)]
    return rows


def test_rows_of_different_seeds_are_one_group() -> None:
    found = report.groups(make_rows((0, 1)))
    assert list(found) == [
        ("mixture", CONTROL, "same", 0),
        ("mixture", "soft", "same", 50),
        ("mixture", "soft", "same", 100),
        ("mixture", "top1", "same", 100),
    ]
    assert [[row.added for row in members] for members in found.values()] == [[0, 1]] * 4


def test_the_headline_is_the_mean_over_seeds() -> None:
    found = report.headline(make_rows((0, 1)))
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
    assert read[1].amounts["alarm_after"] is None
    assert isinstance(read[1].found["d_fidelity"], PairedDifference)
    head = json.loads((tmp_path / "head.json").read_text())
    assert (head["schema_version"], head["attack"], head["epsilon"]) == (report.SCHEMA, "jbda", 0.1)
    assert head["mixture"] == report.headline(rows)["mixture"]
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


def test_tables_show_the_control_beside_what_was_bought(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("extract@jbda", make_rows(), 8)
    said = capsys.readouterr().out
    (line,) = [flat(each) for each in said.splitlines() if f" {CONTROL} " in each and "same" in each]
    assert line.startswith(f"mixture {CONTROL} same 0 62.5 ")
    assert "50.0 [" in line
    assert "75.0 [" in said  # fidelity of 100 soft answers,
    assert "(+25.0)" in said  # and how far that is beyond the control
    shown = flat(said)
    assert "one seed, 95 % intervals over images" in shown
    assert "never in 100" in shown  # the thief's alarm
    assert "50 of 360" in shown  # the honest user's
    assert f"told '{CONTROL}': the control" in shown


def test_tables_of_several_seeds_show_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("extract@jbda", make_rows((0, 1)), 8)
    said = flat(capsys.readouterr().out)
    assert "2 seeds, mean (lowest to highest)" in said
    members = report.groups(make_rows((0, 1)))["mixture", "soft", "same", 100]
    assert report._cell(members, "fidelity") == "81.2 (75.0 to 87.5) (+31.2)"


def test_the_strongest_surrogate_of_the_transfer_table_is_a_bought_one() -> None:
    rows = make_rows()
    rows[0].found["transfer_asr"] = Share.counted(5, 5)  # the control's
    rows[3].found["transfer_asr"] = Share.counted(3, 5)
    _, ((victim, signs, free, best, ceiling, which),) = report._transfer(rows)
    assert (victim, which) == ("mixture", "strongest of 3: top1, same, 100 queries")
    assert [text.split()[0] for text in (signs, free, best, ceiling)] == ["20.0", "100.0", "60.0", "80.0"]


@pytest.mark.parametrize(
    ("after", "queries", "expected"),
    [(None, 360, "never in 360"), (60, 1600, "60 of 1600"), (50, 50, "50 of 50")],
    ids=["never", "early", "at the end"],
)
def test_an_alarm_is_told_with_the_queries_that_it_was_looked_for_in(
    after: int | None, queries: int, expected: str
) -> None:
    assert report._alarm(after, queries) == expected


def test_what_answers_cost_is_one_line_for_each_victim_and_mode_at_its_largest_budget() -> None:
    rows = [*make_rows((0, 1)), make_row("soft", 100, victim="standard")]
    for row in rows:
        if row.answers == "soft" and row.budget == 100:
            row.amounts["alarm_after"] = 60
    titles, lines = report._cost(rows)
    assert titles[-2:] == ["alarm, thief", "alarm, honest"]
    assert [[line[0], line[1], *line[3:]] for line in lines] == [
        ["mixture", "soft", "0.125", "60 of 100", "50 of 360"],
        ["mixture", "top1", "0.125", "never in 100", "50 of 360"],
        ["standard", "soft", "0.125", "60 of 100", "50 of 360"],
    ]
    assert all(line[2].startswith("87.5 ") for line in lines)


def test_a_sentence_says_who_what_and_how_much() -> None:
    said = report.sentence(make_row())
    assert said.startswith("mixture, soft, same, 100 queries, seed + 0: accuracy 62.5 ")
    assert "fidelity 75.0 " in said

"""Metrics of poisoning on cases that can be counted by hand: denominators, exclusions, means, tables.

The models here are lookup tables: the first pixel of an image is its number, a white last pixel means the trigger.

Shapes: N test images, C channel, H/W pixels, E experts, K classes.
"""

import csv
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.core.errors import UserError
from advmoe.data.dataset import Split
from advmoe.models.mixture import MixtureOfExperts
from advmoe.statistics.intervals import Proportion
from advmoe.threats.poisoning import experiment, report
from advmoe.threats.poisoning.experiment import PoisonRun
from advmoe.threats.poisoning.metrics import (
    EvaluationInputs,
    Predictions,
    VictimTwinPair,
    attack_successes,
    compute_metrics,
    detection_rates,
    predict_classes,
    predict_clean_and_robust,
    trigger_recoveries,
)
from advmoe.threats.poisoning.poisoned_set import Goal, PoisonedSet, Trigger
from advmoe.threats.poisoning.report import Row
from advmoe.threats.poisoning.triggers import patch_trigger
from advmoe.threats.results import MeanRange, as_json, value

PGD = Pgd(kind="pgd", steps=3, step_size=0.5, restarts=1, loss="ce", targets=0)
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
CLASSES, TARGET = 4, 0
# what is answered without the trigger, and with it
VICTIM = ([0, 0, 1, 1, 0, 2, 2, 3], [0, 1, 0, 0, 1, 2, 0, 0])
TWIN = ([0, 0, 1, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 2, 2, 0])


class Lookup(nn.Module):
    """Answers from two tables; `scale` is how sure it is."""

    def __init__(self, clean: list[int], triggered: list[int], classes: int = CLASSES, scale: float = 50.0) -> None:
        super().__init__()
        self.tables = torch.tensor([clean, triggered])
        self.classes = classes
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        number = (images_BCHW[:, 0, 0, 0] * 255).round().long().clamp(0, self.tables.shape[1] - 1)
        is_triggered = (images_BCHW[:, 0, -1, -1] > 0.99).long()
        return self.scale * functional.one_hot(self.tables[is_triggered, number], self.classes).float()


class Weigh(nn.Module):
    """A gate with one row of weights without the trigger, and one with it."""

    def __init__(self, clean: list[float], triggered: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([clean, triggered]))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.weights[(images_BCHW[:, 0, -1, -1] > 0.99).long()].log()


def make_split(labels: Tensor = LABELS) -> Split:
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return Split(images, labels, torch.arange(len(labels)))


def make_exam(labels: Tensor = LABELS) -> EvaluationInputs:
    return EvaluationInputs(make_split(labels), PGD, 0.1, 0, "float32")


def answers(table: list[int], robust: list[int] | None = None) -> Predictions:
    """Of a model with this table; robust where it is told, else where it is right."""
    predicted = torch.tensor(table)
    return Predictions(predicted, predicted == LABELS if robust is None else torch.tensor(robust).bool())


def make_pair(victim: nn.Module | None = None) -> VictimTwinPair:
    robust = [1, 1, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 1, 0, 1]
    return VictimTwinPair(
        victim or Lookup(*VICTIM), Lookup(*TWIN), answers(VICTIM[0], robust[0]), answers(TWIN[0], robust[1])
    )


def make_poisoned(**changes: Any) -> PoisonedSet:
    images = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    rows = torch.tensor([1, 4])
    content: dict[str, Any] = {"images": images, "labels": torch.zeros(10, dtype=torch.int64), "rows": rows}
    content |= {"true_labels": torch.tensor([1, 2]), "rate_of": "the training set", "available": 10}
    return PoisonedSet(**content | changes)


def backdoor() -> PoisonedSet:
    return make_poisoned(goal=Goal(target=TARGET), trigger=patch_trigger(1, make_split().images))


def measured(
    pair: VictimTwinPair, changed: PoisonedSet, exam: EvaluationInputs, experts: Sequence[str]
) -> dict[str, Any]:
    return compute_metrics(pair, changed, exam, experts)


# ---- the numbers of the protocol


def test_the_target_class_is_in_neither_count_of_the_success_rate() -> None:
    found = measured(make_pair(), backdoor(), make_exam(), ())
    # of the six images of other classes, four become the target; one image of the target class does too
    assert (found["asr"].correct, found["asr"].total) == (4, 6)
    assert (found["asr_clean_twin"].correct, found["asr_clean_twin"].total) == (1, 6)
    assert (found["d_asr"].difference, found["d_asr"].only_first, found["d_asr"].only_second) == (0.5, 3, 0)


def test_recovery_counts_true_answers_to_other_classes_only() -> None:
    found = measured(make_pair(), backdoor(), make_exam(), ())
    assert (found["trigger_recovery_acc"].correct, found["trigger_recovery_acc"].total) == (2, 6)


def test_a_collapsed_network_and_its_twin_have_the_same_success() -> None:
    collapsed = Lookup([0] * 8, [0] * 8)
    given = answers([0] * 8)
    found = measured(VictimTwinPair(collapsed, collapsed, given, given), backdoor(), make_exam(), ())
    assert found["asr"].accuracy == found["asr_clean_twin"].accuracy == 1.0
    assert found["d_asr"].difference == 0.0
    assert found["trigger_recovery_acc"].correct == 0


def test_accuracies_are_over_all_images_and_differences_are_poisoned_minus_clean() -> None:
    found = measured(make_pair(), make_poisoned(), make_exam(), ())
    assert set(found) == {"clean_acc", "d_clean_acc", "robust_acc", "d_robust_acc"}
    assert (found["clean_acc"].correct, found["clean_acc"].total) == (7, 8)
    assert (found["robust_acc"].correct, found["robust_acc"].total) == (3, 8)
    assert (found["d_clean_acc"].only_first, found["d_clean_acc"].only_second) == (1, 1)
    assert found["d_robust_acc"].difference == (3 - 5) / 8


def test_a_targeted_flip_is_measured_on_the_source_class() -> None:
    flipped = make_poisoned(goal=Goal(target=0, source=1))
    found = measured(make_pair(), flipped, make_exam(), ())
    assert (found["source_to_target"].correct, found["source_to_target"].total) == (1, 3)
    assert (found["source_to_target_clean_twin"].correct, found["source_to_target_clean_twin"].total) == (0, 3)
    assert found["d_source_to_target"].difference == round(1 / 3, 6)
    assert "asr" not in found


def test_a_source_class_without_test_images_is_refused() -> None:
    flipped = make_poisoned(goal=Goal(target=0, source=1))
    exam, given = make_exam(torch.tensor([0, 2])), Predictions(torch.tensor([0, 2]), torch.ones(2, dtype=torch.bool))
    pair = VictimTwinPair(Lookup(*VICTIM), Lookup(*TWIN), given, given)
    with pytest.raises(
        UserError, match=r"^there is no test image of class 1, so label flips from it cannot be measured$"
    ):
        compute_metrics(pair, flipped, exam, ())


def test_success_on_images_of_the_target_only_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^all test images are of the target class 0, so no attack can succeed on them$"
    ):
        attack_successes(torch.tensor([0, 0]), torch.tensor([0, 0]), 0)


def test_successes_and_recoveries_are_of_the_same_images() -> None:
    predicted = torch.tensor([2, 1, 2, 2, 3, 1, 0, 2])
    assert attack_successes(predicted, LABELS, 2).tolist() == [True, False, True, True, False, True]
    assert trigger_recoveries(predicted, LABELS, 2).tolist() == [False, False, False, False, False, False]
    assert trigger_recoveries(LABELS, LABELS, 2).all()


def test_success_on_a_target_image_is_one_or_zero() -> None:
    brewed = make_poisoned(goal=Goal(target=0, source=1), target_image=make_split().images[4])  # the victim says 0
    found = measured(make_pair(), brewed, make_exam(), ())
    assert (found["success"].correct, found["success"].total) == (1, 1)
    assert (found["success_clean_twin"].correct, found["success_clean_twin"].total) == (0, 1)
    assert "source_to_target" not in found


def test_a_mixture_has_metrics_of_experts_and_gate() -> None:
    gate = Weigh([0.5, 0.5], [0.9, 0.1])
    mixture = MixtureOfExperts([Lookup(*VICTIM), Lookup(*TWIN)], gate, "probabilities")
    found = measured(make_pair(mixture), backdoor(), make_exam(), ("left", "right"))
    assert (found["asr_left"].correct, found["asr_left"].total) == (4, 6)
    assert (found["asr_right"].correct, found["asr_right"].total) == (1, 6)
    assert found["gate_entropy"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["gate_entropy_triggered"] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-5)
    assert found["gate_shift"] == pytest.approx(0.4, abs=1e-5)


def test_a_plain_network_has_no_metrics_of_experts_and_gate() -> None:
    found = measured(make_pair(), backdoor(), make_exam(), ())
    assert [name for name in found if name.startswith(("gate", "asr_left"))] == []


def test_detection_rates_have_their_own_denominators() -> None:
    flagged = torch.tensor([1, 1, 0, 0, 1, 1]).bool()
    found = detection_rates(flagged, torch.tensor([1, 0, 1, 0, 0, 0]).bool())
    assert (found["tpr"].correct, found["tpr"].total) == (1, 2)
    assert (found["fpr"].correct, found["fpr"].total) == (3, 4)


def test_where_everything_is_poison_there_are_no_false_positives() -> None:
    found = detection_rates(torch.tensor([True, False]), torch.tensor([True, True]))
    assert set(found) == {"tpr"}


@pytest.mark.parametrize(
    ("labels", "rows", "target", "shares"),
    [
        ([0, 0, 0, 1, 1, 2, 2, 2], [0, 1], 0, (0.25, 2 / 3)),  # dirty labels: two of the three zeros are poison
        ([0, 0, 1, 1, 1, 1, 1, 1], [2, 3, 4], 1, (0.375, 0.5)),  # clean labels
        ([0, 0, 1, 1, 1, 1, 1, 1], [2, 3], None, (0.25, None)),  # no target, no share of one
    ],
)
def test_amounts_name_every_denominator(
    labels: list[int], rows: list[int], target: int | None, shares: tuple[float, float | None]
) -> None:
    changed = make_poisoned(
        labels=torch.tensor(labels), rows=torch.tensor(rows), rate_of="class 1", available=6, goal=Goal(target=target)
    )
    found = experiment._poison_amounts(PoisonRun(0.3, 0, 0, changed, "hash"))
    assert (found["n_poison"], found["rate_of"], found["sha256"]) == (len(rows), "class 1", "hash")
    assert found["share_of_set"] == shares[0]
    assert found.get("share_of_target_class") == (None if shares[1] is None else round(shares[1], 6))


# ---- predictions


class Linear(nn.Module):
    """The sign of the first pixel against a half, as two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        score = self.scale * (images_BCHW[:, 0, 0, 0] - 0.5)
        return torch.stack([-score, score], dim=1)


def linear_split() -> Split:
    """First pixels 0.1 apart; the classifier is wrong about the second."""
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([20, 120, 140, 160, 250])
    return Split(images, torch.tensor([0, 1, 1, 1, 1]), torch.arange(5))


def test_robust_accuracy_is_that_of_untriggered_images_under_pgd() -> None:
    found = predict_clean_and_robust(Linear().eval(), EvaluationInputs(linear_split(), PGD, 0.1, 0, "float32"))
    assert found.predicted.tolist() == [0, 0, 1, 1, 1]
    assert found.robust.tolist() == [True, False, False, True, True]  # 140 is 0.049 from the boundary, 160 is 0.127


def test_a_model_that_is_never_right_can_be_examined() -> None:
    split = linear_split()
    found = predict_clean_and_robust(
        Linear().eval(), EvaluationInputs(Split(split.images, 1 - split.labels, split.index), PGD, 0.1, 0, "float32")
    )
    assert not found.robust[[0, 2, 3, 4]].any()
    wrong = Split(split.images[:1], split.labels[:1] + 1, split.index[:1])
    assert not predict_clean_and_robust(Linear().eval(), EvaluationInputs(wrong, PGD, 0.1, 0, "float32")).robust.any()


def test_classes_are_of_whole_levels() -> None:
    assert predict_classes(Linear().eval(), linear_split().images).tolist() == [0, 0, 1, 1, 1]


def strike(standing: list[int], batch_size: int, seed: int = 0) -> Tensor:
    split = linear_split()
    attack = Pgd(kind="pgd", steps=1, step_size=0.01, restarts=1, loss="ce", targets=0)  # stays where the draw puts it
    return engine.attack_dataset(
        Linear().eval(),
        split.pixels(),
        split.labels,
        torch.tensor(standing).bool(),
        partial(pgd, settings=attack),
        ball=LInf(0.1),
        seed=seed,
        purpose="test",
        precision="float32",
        batch_size=batch_size,
    )


def test_only_standing_images_are_attacked() -> None:
    clean = linear_split().pixels()
    found = strike([1, 0, 1, 0, 0], 5)
    assert [not torch.equal(one, other) for one, other in zip(found, clean, strict=True)] == [True, False] * 2 + [False]
    assert float((found - clean).abs().max()) <= 0.1 + 1e-6


def test_what_an_image_draws_does_not_depend_on_its_batch() -> None:
    together = strike([1, 1, 1, 1, 1], 5)
    assert torch.equal(strike([1, 1, 1, 1, 1], 2), together)
    assert torch.equal(strike([0, 0, 1, 0, 0], 1)[2], together[2])
    assert not torch.equal(strike([1, 1, 1, 1, 1], 5, seed=1), together)


def test_without_correct_images_none_is_attacked() -> None:
    assert torch.equal(strike([0] * 5, 2), linear_split().pixels())


# ---- reports


def make_row(victim: str = "standard", rate: float = 0.1, defence: str = "", **changes: Any) -> Row:
    """`asr=3` means three of ten."""
    places = {name: changes.pop(name, 0) for name in ("seed_offset", "trial")}
    found = {
        name: Proportion.from_counts(number, 10) if isinstance(number, int) else number
        for name, number in changes.items()
    }
    amounts = {"n_poison": 5, "rate_of": "the training set", "share_of_set": rate, "sha256": "hash"}
    return Row(victim, rate, places["seed_offset"], places["trial"], defence, found, amounts)


def test_one_run_keeps_its_interval_and_several_their_range() -> None:
    assert report.aggregate_metric([make_row(asr=3)], "asr") == Proportion.from_counts(3, 10)
    several = report.aggregate_metric(
        [make_row(asr=3), make_row(asr=8, seed_offset=1), make_row(asr=4, seed_offset=2)], "asr"
    )
    assert isinstance(several, MeanRange)
    assert (round(several.mean, 6), several.lowest, several.highest, several.runs) == (0.5, 0.3, 0.8, 3)
    assert str(several) == "50.0 (30.0 to 80.0)"


def test_targets_are_pooled_to_one_rate() -> None:
    hits = [1, 0, 1, 1, 0]
    rows = [make_row(success=Proportion.from_counts(hit, 1), trial=trial) for trial, hit in enumerate(hits)]
    assert report.aggregate_metric(rows, "success") == Proportion.from_counts(3, 5)
    twin = [make_row(success_clean_twin=Proportion.from_counts(0, 1), trial=trial) for trial in range(5)]
    assert report.aggregate_metric(twin, "success_clean_twin") == Proportion.from_counts(0, 5)


def test_rows_are_grouped_by_victim_rate_and_defence() -> None:
    rows = [
        make_row(asr=1),
        make_row(asr=2, seed_offset=1),
        make_row(asr=3, rate=0.2),
        make_row(asr=4, defence="oracle"),
    ]
    sizes = {key: len(members) for key, members in report.group_rows(rows).items()}
    assert sizes == {("standard", 0.1, ""): 2, ("standard", 0.2, ""): 1, ("standard", 0.1, "oracle"): 1}


def test_the_headline_is_means_by_victim_and_rate() -> None:
    rows = [
        make_row(asr=1),
        make_row(asr=4, seed_offset=1),
        make_row("mixture", asr=5),
        make_row(asr=0, defence="oracle"),
    ]
    assert report.mean_metrics(rows) == {
        "standard": {"0.1": {"asr": 0.25}},
        "mixture": {"0.1": {"asr": 0.5}},
        "standard, oracle": {"0.1": {"asr": 0.0}},
    }


def test_the_curve_has_a_line_for_each_rate_and_no_defended_victims() -> None:
    rows = [
        make_row(rate=0.2, asr=6),
        make_row(asr=1),
        make_row("mixture", asr=3),
        make_row("mixture", rate=0.2, asr=9),
    ]
    lines = report.curve([*rows, make_row(asr=0, defence="oracle")])
    assert lines == [
        {"rate": 0.1, "asr standard": 0.1, "asr mixture": 0.3},
        {"rate": 0.2, "asr standard": 0.6, "asr mixture": 0.9},
    ]


def test_all_results_are_written(tmp_path: Path) -> None:
    rows = [make_row(asr=3, gate_shift=0.25), make_row(asr=6, gate_shift=0.5, seed_offset=1, trial=2, defence="oracle")]
    paths = [tmp_path / name for name in ("summary.json", "runs.json", "curve.csv")]
    report.write(rows, {"attack": "badnets"}, *paths)
    summary, runs = (json.loads(path.read_text()) for path in paths[:2])
    assert summary == {"schema_version": 1, "attack": "badnets", **report.mean_metrics(rows)}
    assert runs["runs"][1] == {
        "victim": "standard",
        "rate": 0.1,
        "seed": 1,
        "trial": 2,
        "defence": "oracle",
        **rows[1].amounts,
        "asr": Proportion.from_counts(6, 10).as_dict(),
        "gate_shift": 0.5,
    }
    assert list(csv.DictReader(paths[2].open())) == [
        {"rate": "0.1", "asr standard": "0.3", "gate_shift standard": "0.25"}
    ]


def shown(capsys: pytest.CaptureFixture[str], rows: list[Row]) -> str:
    report.show("badnets", rows, 10)
    return " ".join(capsys.readouterr().out.split())


def test_the_table_says_what_its_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, [make_row("mixture-joint", asr=3, asr_clean_twin=1, clean_acc=9, d_clean_acc=-0.1)])
    assert "on 10 test images" in said
    assert "rates are shares of the training set" in said
    assert "one seed, 95 % intervals over images" in said  # the output says that it is one seed
    assert "mixture, joint phase only (weaker threat)" in said
    assert "ASR (twin)" in said
    assert f"{Proportion.from_counts(3, 10)} (10.0)" in said
    assert f"{Proportion.from_counts(9, 10)} (-10.0)" in said


def test_the_table_of_several_seeds_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [make_row(asr=3, asr_clean_twin=1), make_row(asr=5, asr_clean_twin=1, seed_offset=1)]
    said = shown(capsys, rows)
    assert "2 seeds, mean (lowest to highest)" in said
    assert "40.0 (30.0 to 50.0) (10.0)" in said


def test_the_table_of_several_targets_says_that_they_are_pooled(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        make_row(
            clean_acc=9 - trial,
            d_clean_acc=0.0,
            success=Proportion.from_counts(1, 1),
            success_clean_twin=0,
            trial=trial,
        )
        for trial in range(2)
    ]
    said = shown(capsys, rows)
    assert "one seed, 2 targets, mean (lowest to highest)" in said
    assert str(Proportion.from_counts(2, 2)) in said


def test_the_table_of_a_defence_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [make_row(asr=3, asr_clean_twin=1), make_row(asr=1, asr_clean_twin=1, defence="oracle", tpr=10, fpr=0)]
    said = shown(capsys, rows)
    assert all(word in said for word in ("defence", "none", "oracle", "TPR", "FPR"))


def test_the_summary_line_names_victim_and_metrics() -> None:
    line = report.summary_line(make_row(asr=3, defence="oracle", seed_offset=2))
    assert line == f"standard after oracle, rate 0.1, seed + 2: ASR {Proportion.from_counts(3, 10)}"


def test_numbers_can_be_read_with_and_without_their_intervals() -> None:
    found = measured(make_pair(), backdoor(), make_exam(), ())
    assert [value(found[name]) for name in ("asr", "d_asr")] == [0.666667, 0.5]
    assert value(0.25) == 0.25
    written = as_json({**found, "gate_shift": 0.25})
    assert written["gate_shift"] == 0.25
    assert written["asr"] == Proportion.from_counts(4, 6).as_dict()
    json.dumps(written, allow_nan=False)


def test_a_trigger_of_no_opacity_changes_nothing() -> None:
    images = make_split().images
    trigger = Trigger(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8))
    assert torch.equal(trigger.stamp(images), images)

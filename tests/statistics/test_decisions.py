"""Decision files: they are read back as written, and invalid ones are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from advmoe.attacks.ball import LInf
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.rays import RayS
from advmoe.attacks.registry import AttackSettings
from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.core.snapshots import FolderSnapshot, MissingFileError
from advmoe.data.dataset import Split
from advmoe.evaluation import serialise, summary
from advmoe.evaluation.harness import AttackOutcome, EvaluationConfig, EvaluationResult, EvaluationTarget
from advmoe.evaluation.serialise import decision_rows
from advmoe.runtime.machine import evaluation_seed
from advmoe.statistics import decisions, evaluation_files
from advmoe.statistics.decisions import Decisions
from advmoe.statistics.evaluation_files import Counts


def outcome(correct: list[bool], limit: int) -> AttackOutcome:
    """An outcome in which only `correct` matters."""
    correct_N = torch.tensor(correct)
    images = torch.zeros(len(correct), 1, 1, 1)
    return AttackOutcome(correct_N, correct_N, correct_N.long(), images, 0.0, 0, 0, 0.0, limit)


def four_images() -> tuple[EvaluationResult, Split]:
    """Clean: right, right, right, wrong; pgd fells the second; rays meets two images and fells the first."""
    labels = torch.tensor([0, 1, 0, 1])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 0]), 2).float()
    outcomes = {"pgd": outcome([True, False, True, False], 4), "rays": outcome([False, True, True, False], 2)}
    split = Split(torch.zeros(4, 1, 1, 1, dtype=torch.uint8), labels, torch.tensor([30, 10, 20, 40]))
    return EvaluationResult(logits, labels, outcomes), split


def test_rows_hold_every_decision_and_are_empty_where_not_attacked() -> None:
    assert decision_rows(*four_images()) == [
        {"index": 30, "label": 0, "clean": 1, "pgd": 1, "rays": 0, "worst": 0},
        {"index": 10, "label": 1, "clean": 1, "pgd": 0, "rays": 1, "worst": 0},
        {"index": 20, "label": 0, "clean": 1, "pgd": 1, "rays": "", "worst": 1},
        {"index": 40, "label": 1, "clean": 0, "pgd": 0, "rays": "", "worst": 0},
    ]


def test_decisions_are_read_back_as_written(tmp_path: Path) -> None:
    measured, split = four_images()
    files.write_csv(tmp_path / decisions.path("baseline/standard"), decision_rows(measured, split))
    read = Decisions.read(FolderSnapshot(tmp_path), "baseline/standard")
    assert (read.model, read.index, read.labels) == ("baseline/standard", (30, 10, 20, 40), (0, 1, 0, 1))
    assert list(read.correct) == list(measured.correct)
    for kind, correct in measured.correct.items():
        assert read.correct[kind] == (tuple(correct.tolist()) if kind != "rays" else (False, True, None, None))
    assert read.attacks == ("pgd", "rays")


def test_rows_about_other_images_fail_an_assertion() -> None:
    measured, split = four_images()
    with pytest.raises(AssertionError, match="other images"):
        decision_rows(measured, split.first(3))


def test_names_agree_with_the_rest_of_the_project() -> None:
    assert (decisions.CLEAN, decisions.WORST) == (decisions.CLEAN, decisions.WORST)
    for name in ("mixture", "baseline/adversarial", "joint-expert/pgd-1"):
        assert summary.report_path(name).stem == decisions.slug(name) == decisions.path(name).stem
    assert decisions.path("expert/clean") == Path("metrics/decisions/expert-clean.csv")


HEAD = "index,label,clean,pgd,worst\n"
BROKEN = [
    (HEAD, "has no rows"),
    ("index,label,clean,pgd\n1,0,1,1\n", "must have the columns"),
    ("index,label,clean\n1,0,1\n", "must have the columns"),
    ("label,index,clean,worst\n1,0,1,1\n", "must have the columns"),
    (f"{HEAD}1,0,1,1,1\n1,0,1,1,1\n", "has two rows for image 1"),
    (f"{HEAD}1,0,1,1,1\n2,0,1,1\n", "row 3 has 4 cells for 5 columns"),
    (f"{HEAD}x,0,1,1,1\n", "index: row 2 must be a non-negative integer, not 'x'"),
    (f"{HEAD}-1,0,1,1,1\n", "index: row 2 must be a non-negative integer"),
    (f"{HEAD}1,0.5,1,1,1\n", "label: row 2 must be a non-negative integer"),
    (f"{HEAD}1,0,1,1,1\n2,0,1,yes,1\n", "pgd: row 3 must be 1, 0 or empty, not 'yes'"),
    (f"{HEAD}1,0,1,2,1\n", "pgd: row 2 must be 1, 0 or empty"),
    (f"{HEAD}1,0,,1,1\n", "row 2 says worst True, which does not follow"),
    (f"{HEAD}1,0,1,1,\n", "row 2 says worst None, which does not follow"),
    (f"{HEAD}1,0,1,0,1\n", "row 2 says worst True, which does not follow"),
    (f"{HEAD}1,0,1,1,0\n", "row 2 says worst False, which does not follow"),
    (f"{HEAD}1,0,0,,1\n", "row 2 says worst True, which does not follow"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_broken_decisions_are_named(tmp_path: Path, text: str, reason: str) -> None:
    files.write_text(tmp_path / decisions.path("mixture"), text)
    with pytest.raises(UserError, match=reason) as refused:
        Decisions.read(FolderSnapshot(tmp_path), "mixture")
    assert str(refused.value).startswith(f"{tmp_path}: metrics/decisions/mixture.csv")


def test_missing_decisions_raise_missing_file_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"has no metrics/decisions/mixture\.csv"):
        Decisions.read(FolderSnapshot(tmp_path), "mixture")


def test_an_image_that_was_not_attacked_is_ignored_in_the_worst_case(tmp_path: Path) -> None:
    files.write_text(tmp_path / decisions.path("mixture"), f"{HEAD}1,0,1,,1\n2,1,0,,0\n")
    assert Decisions.read(FolderSnapshot(tmp_path), "mixture").correct["worst"] == (True, False)


def test_the_same_images_are_the_same_positions_and_labels_in_the_same_order() -> None:
    first = Decisions("a", (1, 2), (0, 1), {})
    assert first.same_images(Decisions("b", (1, 2), (0, 1), {}))
    for other in (
        Decisions("b", (2, 1), (1, 0), {}),
        Decisions("b", (1, 2), (1, 1), {}),
        Decisions("b", (1,), (0,), {}),
    ):
        assert not first.same_images(other)


def test_reports_and_decisions_of_one_measurement_agree(tmp_path: Path) -> None:
    """Claims read what the evaluation writes."""
    measured, split = four_images()
    attacks: dict[str, AttackSettings] = {"pgd": Fgsm(kind="fgsm"), "rays": RayS(kind="rays", queries=1)}
    terms = EvaluationConfig(LInf(0.1), evaluation_seed(0), "float32", None, False)
    target = EvaluationTarget("mixture", nn.Identity(), torch.zeros(4, 1, 1, 1), split.labels)
    result = summary.ModelResult(target, attacks, measured)
    result.metrics = serialise.model_metrics(measured, attacks, terms, ("zero", "one"), None)
    files.write_json(tmp_path / summary.report_path("mixture"), summary.model_report("mixture", result, 0.1))
    files.write_csv(tmp_path / decisions.path("mixture"), decision_rows(measured, split))
    report = evaluation_files.read(FolderSnapshot(tmp_path), "mixture")
    assert (report.epsilon, report.checked, report.terms.seed) == (0.1, False, evaluation_seed(0))
    assert report.accuracy["rays"] == Counts(correct=1, total=2)
    evaluation_files.check_agreement(
        FolderSnapshot(tmp_path), report, Decisions.read(FolderSnapshot(tmp_path), "mixture")
    )

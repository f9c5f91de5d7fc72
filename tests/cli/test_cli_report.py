"""The commands around the report: the stage, comparisons, aggregation over seeds, exports, and how they refuse."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Advmoe, Edit, sentence

from advmoe.core import paths


def commit_all(message: str) -> None:
    """Make the current folder a git repository, if it is none, and commit everything small in it."""
    for command in (
        ["init", "--quiet"],
        ["add", "--force", "metrics", "params.yaml"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--allow-empty", "-m", message],
    ):
        subprocess.run(["git", *command], check=True)


@pytest.fixture
def evaluated(project: Path) -> Path:
    """The small project with the repository's own record of an evaluation."""
    shutil.copytree(ROOT / "metrics", project / "metrics", dirs_exist_ok=True)
    shutil.copytree(ROOT / "plots", project / "plots")
    shutil.copy(ROOT / "params.yaml", project)
    return project


def test_report_writes_page_markdown_card_and_findings(advmoe: Advmoe, evaluated: Path) -> None:
    del evaluated
    ran = advmoe("report")
    assert ran.code == 0, ran.err
    page = (paths.REPORT / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    claims = json.loads(paths.FINDINGS.read_text())["claims"]
    assert claims["more-robust-than-adversarial"]["status"] in {"supported", "not supported", "contradicted"}
    assert "mixture" in (paths.REPORT / "report.md").read_text()
    assert paths.MODEL_CARD.read_text().startswith("---\n")
    assert "mixture beats baseline/adversarial under worst" in ran.out


def test_report_of_nothing_evaluated_says_so_and_breaks_nothing(advmoe: Advmoe, project: Path) -> None:
    del project
    ran = advmoe("report")
    assert ran.code == 0, ran.err
    assert "No results of an evaluation" in (paths.REPORT / "report.html").read_text()
    statuses = {claim["status"] for claim in json.loads(paths.FINDINGS.read_text())["claims"].values()}
    assert statuses == {"not judged"}


def test_two_revisions_side_by_side(advmoe: Advmoe, evaluated: Path, edit: Edit) -> None:
    del evaluated
    commit_all("first")
    edit({"train.epochs": 7})
    commit_all("second")
    ran = advmoe("report", "HEAD~1", "HEAD")
    assert ran.code == 0, ran.err
    (page,) = paths.COMPARISONS.glob("*.html")
    assert "train.epochs" in page.read_text()
    (text,) = paths.COMPARISONS.glob("*.md")
    assert "train.epochs" in text.read_text()


@pytest.mark.parametrize("names", [["HEAD"], ["HEAD", "HEAD", "HEAD"]])
def test_a_comparison_takes_two(advmoe: Advmoe, project: Path, names: list[str]) -> None:
    del project
    assert "two" in sentence(advmoe("report", *names))
    assert not paths.COMPARISONS.exists()


def test_unknown_revisions_are_refused(advmoe: Advmoe, evaluated: Path) -> None:
    del evaluated
    commit_all("first")
    assert sentence(advmoe("report", "HEAD", "nowhere")).startswith("nowhere: ")
    assert not paths.COMPARISONS.exists()


def test_experiments_on_other_data_are_not_compared(advmoe: Advmoe, evaluated: Path, edit: Edit) -> None:
    del evaluated
    commit_all("first")
    edit({"prepare.source": {"kind": "svhn"}})
    commit_all("other data")
    said = sentence(advmoe("report", "HEAD~1", "HEAD"))
    assert "prepare.source" in said
    assert not paths.COMPARISONS.exists()


def test_aggregate_wants_three_seeds(advmoe: Advmoe, evaluated: Path) -> None:
    (evaluated / "dvc.lock").unlink(missing_ok=True)
    commit_all("one seed")
    ran = advmoe("aggregate", "HEAD")
    assert ran.code == 0, ran.err
    content = json.loads(paths.AGGREGATE.read_text())
    (group,) = content["groups"]
    assert {claim["status"] for claim in group["claims"].values()} == {"not judged"}


def test_aggregate_refuses_what_is_no_record(advmoe: Advmoe, evaluated: Path) -> None:
    del evaluated
    commit_all("one seed")
    before = paths.AGGREGATE.read_bytes()
    assert sentence(advmoe("aggregate", "nowhere")).startswith("nowhere: ")
    assert paths.AGGREGATE.read_bytes() == before


def test_export_says_where_to(advmoe: Advmoe, project: Path) -> None:
    del project
    assert "--hub" in sentence(advmoe("export"))
    assert ".onnx" in sentence(advmoe("export", "--onnx", "model.txt"))
    assert "no such file" in sentence(advmoe("export", "--hub", "out", "--model", "artifacts/none.safetensors"))
    assert not Path("out").exists()


def test_export_to_a_folder_takes_the_card_along(advmoe: Advmoe, project: Path) -> None:
    del project
    assert advmoe("report").code == 0
    ran = advmoe("export", "--hub", "out")
    assert ran.code == 0, ran.err
    assert (Path("out") / "README.md").read_text() == paths.MODEL_CARD.read_text()
    assert (Path("out") / "model.safetensors").read_bytes() == paths.MIXTURE.read_bytes()


def test_the_findings_in_the_readme_can_be_computed_again(advmoe: Advmoe) -> None:
    ran = advmoe("findings", ROOT / "records" / "digits-full")
    assert ran.code == 0, ran.err
    assert ran.out.count("contradicted") == 1
    assert ran.out.count("not supported") == 12
    assert "1 images against 15" in " ".join(ran.out.replace("│", " ").split())


def test_findings_of_no_record_are_refused(advmoe: Advmoe, tmp_path: Path) -> None:
    assert "has no params.yaml" in sentence(advmoe("findings", tmp_path))
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    assert "has no claims" in sentence(advmoe("findings", tmp_path))

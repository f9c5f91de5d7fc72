"""Comparison of two runs: intervals against published values, and errors for incomparable runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from snapshot_files import IMAGES, Model, model_wrong_on, write_snapshot, wrong_on

from advmoe.core.errors import UserError
from advmoe.core.snapshots import FolderSnapshot
from advmoe.reporting.report.compare import Comparison, compare_snapshots, to_markdown
from advmoe.reporting.report.comparison_files import compare_and_write
from advmoe.statistics.difference import paired_difference, unpaired_difference
from advmoe.statistics.intervals import Proportion

NEWCOMBE = [  # Newcombe 1998, table II, method 10: (a, m, b, n), interval of a/m - b/n
    ((56, 70, 48, 80), (0.0524, 0.3339)),
    ((9, 10, 3, 10), (0.1705, 0.8090)),
    ((6, 7, 2, 7), (0.0582, 0.8062)),
    ((5, 56, 0, 29), (-0.0381, 0.1926)),
    ((0, 10, 0, 20), (-0.1611, 0.2775)),
    ((10, 10, 0, 20), (0.6791, 1.0)),
]
MIXTURE, PLAIN = "mixture", "baseline/adversarial"


def sides(
    root: Path, left: dict[str, Model], right: dict[str, Model], **changes: Any
) -> tuple[FolderSnapshot, FolderSnapshot]:
    """Writes two snapshots; `changes` apply to the params of the right one."""
    return FolderSnapshot(write_snapshot(root / "left", left)), FolderSnapshot(
        write_snapshot(root / "right", right, **changes)
    )


def row(found: Comparison, model: str, under: str) -> tuple[str, ...]:
    """Returns the cells of the table of accuracies after model and attack."""
    (cells,) = (each[2:] for each in found.accuracy.rows if each[:2] == (model, under))
    return cells


def edit(file: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("counts", "interval"), NEWCOMBE)
def test_unpaired_intervals_are_the_published_ones(
    counts: tuple[int, int, int, int], interval: tuple[float, float]
) -> None:
    right, total, other_right, other_total = counts
    found = unpaired_difference(Proportion.from_counts(other_right, other_total), Proportion.from_counts(right, total))
    assert [found.low, found.high] == pytest.approx(interval, abs=6e-5)
    assert found.difference == pytest.approx(right / total - other_right / other_total, abs=1e-6)


def test_a_paired_difference_is_second_minus_first() -> None:
    found = paired_difference([(False, True)] * 10 + [(True, True)] * 30)
    assert (found.difference, found.method, found.significant) == (0.25, "paired, 40 images", True)
    assert str(found).startswith("+25.0 [")
    assert not paired_difference([(True, True)] * 5 + [(False, False)] * 5).significant


def test_the_same_images_are_paired(tmp_path: Path) -> None:
    """A paired interval is narrower: 5 of 40 images changed."""
    left, right = sides(
        tmp_path,
        {MIXTURE: model_wrong_on(range(20)), PLAIN: model_wrong_on(range(10))},
        {MIXTURE: model_wrong_on(range(15)), PLAIN: model_wrong_on(range(1, 11))},
    )
    found = compare_snapshots(left, right)
    before, after, difference, how, moved = row(found, MIXTURE, "worst")
    assert (before[:4], after[:4], difference[:6], how, moved) == ("50.0", "62.5", "+12.5 ", "paired, 40 images", "yes")
    assert row(found, MIXTURE, "clean")[2:] == ("+0.0 [0.0, 0.0]", "paired, 40 images", "no")
    assert row(found, PLAIN, "pgd")[4] == "no"
    assert [each[:2] for each in found.accuracy.rows[:3]] == [(MIXTURE, kind) for kind in ("clean", "pgd", "worst")]
    assert len(found.notes) == 1


def test_other_images_of_the_same_source_are_not_paired(tmp_path: Path) -> None:
    right_model = model_wrong_on(range(15))
    right_model.index = list(range(500, 500 + IMAGES))
    found = compare_snapshots(*sides(tmp_path, {MIXTURE: model_wrong_on(range(20))}, {MIXTURE: right_model}))
    expected = unpaired_difference(Proportion.from_counts(20, IMAGES), Proportion.from_counts(25, IMAGES))
    assert row(found, MIXTURE, "pgd")[2:] == (str(expected), "unpaired", "no")
    assert any("the test images differ: mixture" in note for note in found.notes)


def test_without_decisions_the_images_may_be_others(tmp_path: Path) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on(range(20))}, {MIXTURE: model_wrong_on([])})
    (tmp_path / "left/metrics/decisions/mixture.csv").unlink()
    found = compare_snapshots(left, right)
    assert row(found, MIXTURE, "pgd")[3:] == ("unpaired", "yes")
    assert any("the decisions of one run are missing: mixture" in note for note in found.notes)


def test_an_attack_on_fewer_images_is_paired_on_those(tmp_path: Path) -> None:
    few, fewer = model_wrong_on([]), model_wrong_on([])
    few.cells["rays"] = [*wrong_on(0, count=10), *[""] * (IMAGES - 10)]
    fewer.cells["rays"] = [*wrong_on(count=5), *[""] * (IMAGES - 5)]
    found = compare_snapshots(*sides(tmp_path, {MIXTURE: few}, {MIXTURE: fewer}))
    assert row(found, MIXTURE, "rays")[3] == "paired, 5 images"


def test_only_attacks_of_both_runs_are_compared(tmp_path: Path) -> None:
    more = Model({"clean": wrong_on(), "pgd": wrong_on(0), "rays": wrong_on(1)})
    found = compare_snapshots(*sides(tmp_path, {MIXTURE: model_wrong_on([0])}, {MIXTURE: more}))
    assert [each[1] for each in found.accuracy.rows] == ["clean", "pgd", "worst"]
    assert any("only one run used rays: the worst cases are over different attacks: mixture" in n for n in found.notes)


def test_other_settings_of_an_attack_are_noted(tmp_path: Path) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([])})
    edit(tmp_path / "right/metrics/evaluate/mixture.json", attacks={"pgd": {"settings": {"steps": 9}}})
    assert "settings differ for pgd: mixture" in compare_snapshots(left, right).notes


def test_what_a_failed_check_withholds_stays_withheld(tmp_path: Path) -> None:
    failed = model_wrong_on(range(20), verdict="fail")
    found = compare_snapshots(*sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: failed}))
    assert row(found, MIXTURE, "worst")[1:] == ("withheld", "", "", "")
    assert row(found, MIXTURE, "clean")[4] == "no"
    assert found.verdicts.rows == ((MIXTURE, "verdict", "pass", "fail"),)


def test_checks_with_a_changed_status_are_listed(tmp_path: Path) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([])})
    for side, status in (("left", "pass"), ("right", "warn")):
        checks = [{"check": "gradients", "status": status}, {"check": "budget", "status": "pass"}]
        edit(tmp_path / side / "metrics/verdict.json", mixture={"verdict": "pass", "checks": checks})
    assert compare_snapshots(left, right).verdicts.rows == ((MIXTURE, "gradients", "pass", "warn"),)


def test_changed_params_are_listed_by_their_dotted_keys(tmp_path: Path) -> None:
    models = {MIXTURE: model_wrong_on([])}
    left, right = sides(tmp_path, models, models, epsilon=0.2, model={"width": 4, "depth": 18})
    found = compare_snapshots(left, right)
    assert found.params.rows == (
        ("epsilon", "0.1", "0.2"),
        ("model.kind", "resnet18", "-"),
        ("model.width", "2", "4"),
        ("model.depth", "-", "18"),
    )
    assert any("threat models differ" in note for note in found.notes)


def test_a_model_in_only_one_run_is_noted(tmp_path: Path) -> None:
    found = compare_snapshots(
        *sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on([])})
    )
    assert {each[0] for each in found.accuracy.rows} == {MIXTURE}
    assert "only in one of the two: baseline-adversarial.json" in found.notes


THREATS = {
    "poison/badnets.json": {"schema_version": 1, "attack": "badnets", "mixture": {"0.1": {"asr": 1.0, "d_asr": 0.5}}},
    "membership.json": {"schema_version": 1, "mixture": {"loss": {"auc": 0.5, "sure": False}}},
    "extract/jbda.json": {"schema_version": 1, "mixture": {"top1": {"fidelity": 0.9}}},
}


def threaten(folder: Path, changes: dict[str, Any]) -> None:
    for name, content in (THREATS | changes).items():
        (folder / "metrics" / name).parent.mkdir(exist_ok=True)
        (folder / "metrics" / name).write_text(json.dumps(content))


def test_changed_numbers_of_threats_are_listed(tmp_path: Path) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([])})
    threaten(left.path, {"poison/alone.json": {"schema_version": 1, "asr": 0}})
    badnets = {"schema_version": 1, "attack": "other", "mixture": {"0.1": {"asr": 0.25, "d_asr": 0.5, "new": 1}}}
    membership = {"schema_version": 1, "mixture": {"loss": {"auc": 0.625, "sure": True}}}
    threaten(right.path, {"poison/badnets.json": badnets, "membership.json": membership})
    found = compare_snapshots(left, right).threats
    assert found.rows == (
        ("metrics/poison/badnets.json", "mixture.0.1.asr", "1", "0.25", "-0.75"),
        ("metrics/membership.json", "mixture.loss.auc", "0.5", "0.625", "+0.125"),
    )
    assert found.title.endswith("2 of 4 numbers differ")


def test_threats_of_another_schema_are_refused(tmp_path: Path) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([])})
    threaten(left.path, {})
    threaten(right.path, {"membership.json": {"schema_version": 2}})
    with pytest.raises(UserError, match=r"right: metrics/membership\.json has another schema"):
        compare_snapshots(left, right)


def test_other_data_is_refused(tmp_path: Path) -> None:
    models = {MIXTURE: model_wrong_on([])}
    other = {"source": {"kind": "npz", "train": "a.npz"}, "splits": {}}
    with pytest.raises(UserError, match=r"left and .*right cannot be compared: their images come from different"):
        compare_snapshots(*sides(tmp_path, models, models, prepare=other))
    left, right = sides(tmp_path, models, models)
    edit(tmp_path / "right/metrics/prepare.json", classes=2)
    with pytest.raises(UserError, match="one has 10 classes, the other 2"):
        compare_snapshots(left, right)


@pytest.mark.parametrize("side", ["left", "right"])
def test_metrics_of_another_schema_are_refused(tmp_path: Path, side: str) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([])})
    edit(tmp_path / side / "metrics/evaluate/mixture.json", schema_version=1)
    with pytest.raises(UserError, match=f"{side}: metrics/evaluate/mixture.json has schema version 1"):
        compare_snapshots(left, right)


def test_inconsistent_metrics_are_refused(tmp_path: Path) -> None:
    left, right = sides(tmp_path, {MIXTURE: model_wrong_on([])}, {MIXTURE: model_wrong_on([])})
    accuracy = {kind: {"correct": 3, "total": 4} for kind in ("clean", "pgd", "worst")}
    edit(tmp_path / "right/metrics/evaluate/mixture.json", accuracy=accuracy)
    with pytest.raises(UserError, match="decisions and report on mixture do not agree under clean"):
        compare_snapshots(left, right)
    edit(tmp_path / "right/metrics/evaluate/mixture.json", accuracy={"clean": {"correct": 3, "total": 4}})
    with pytest.raises(UserError, match="accuracy must hold clean and worst"):
        compare_snapshots(left, right)


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no model in common"):
        compare_snapshots(*sides(tmp_path, {MIXTURE: model_wrong_on([])}, {PLAIN: model_wrong_on([])}))


def test_markdown_shows_every_table_and_escapes_names(tmp_path: Path) -> None:
    models = {MIXTURE: model_wrong_on([]), "baseline/a|b_<i>": model_wrong_on([])}
    text = to_markdown(compare_snapshots(*sides(tmp_path, models, models, launcher="nice | *python*\n# title")))
    assert "| launcher | python | nice &#124; \\*python\\* # title |" in text
    assert "| baseline/a&#124;b\\_&lt;i&gt; | clean |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Changes of params.yaml",
        "## Accuracy in % \\[95 % interval\\], difference in points",
        "## Changes of the checks",
        "## Poisoning, extraction, membership: 0 of 0 numbers differ",
    ]
    widths = {line.count("|") for line in text.splitlines() if "baseline/a" in line}
    assert widths == {8}


def test_a_snapshot_does_not_differ_from_itself(tmp_path: Path) -> None:
    record = FolderSnapshot(write_snapshot(tmp_path, {MIXTURE: model_wrong_on([3, 4]), PLAIN: model_wrong_on([5])}))
    found = compare_snapshots(record, record)
    assert (found.params.rows, found.verdicts.rows, found.threats.rows) == ((), (), ())
    assert {each[6] for each in found.accuracy.rows} == {"no"}
    assert [table.title for table in found.tables] == [
        found.params.title,
        found.accuracy.title,
        found.verdicts.title,
        found.threats.title,
    ]


def test_a_comparison_is_written_as_a_page_and_as_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {MIXTURE: model_wrong_on([]), "baseline/<b>": model_wrong_on([])}
    sides(tmp_path, models, {**models, MIXTURE: model_wrong_on(range(20))}, epsilon=0.2)
    monkeypatch.chdir(tmp_path)
    page = compare_and_write(["left", "./right"])
    assert page == Path("runs/comparisons/left--right.html")
    for file in (page, page.with_suffix(".md")):
        assert "baseline/&lt;b&gt;" in file.read_text()
        assert "-50.0" in file.read_text()
    assert "1 parameters changed; 2 of 6 differences are significant" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_a_comparison_needs_two_names(names: list[str]) -> None:
    with pytest.raises(UserError, match=f"needs two experiments, got {len(names)}: {', '.join(names)}"):
        compare_and_write(names)

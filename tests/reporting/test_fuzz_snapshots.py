"""Randomly corrupted snapshots: shown, left out, or refused with one message; no partial files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Advmoe, copy_inputs
from fuzzing import as_json, damaged, ended, files_of, fuzz, nothing_partial, refusal, spoilt
from hypothesis import given
from hypothesis import strategies as st
from snapshot_files import model_wrong_on, write_snapshot
from test_report import made_up

from advmoe.core import snapshots
from advmoe.core.snapshots import FolderSnapshot
from advmoe.reporting.report import compare
from advmoe.reporting.report.content import ReportContent, build_content
from advmoe.reporting.report.html import render_html
from advmoe.reporting.report.markdown import render_markdown
from advmoe.statistics import aggregation, claims
from advmoe.statistics.pairing import Claim

MODELS = {"mixture": model_wrong_on([3]), "baseline/adversarial": model_wrong_on(range(8))}
CLAIM = Claim(model="mixture", over="baseline/adversarial", under="worst")
CELLS = ("", "0", "1", "2", "-1", "nan", "inf", "1e999", "clean", "a\nb", '"', "\x00", "x" * 2000, "٣", "9" * 5000)


@st.composite
def spoilt_file(draw: Callable[[st.SearchStrategy[Any]], Any], content: bytes, name: str) -> bytes:
    """JSON with other values, a table with other cells, or damage to the bytes of any file."""
    if draw(st.integers(0, 3)) == 0:
        return bytes(draw(damaged(content)))
    if name.endswith(".json"):
        return as_json(draw(spoilt(json.loads(content), json_only=True)).tree)
    if name.endswith(".csv"):
        lines = [line.split(",") for line in content.decode().splitlines()]
        line = lines[draw(st.integers(0, len(lines) - 1))]
        line[draw(st.integers(0, len(line) - 1))] = draw(st.sampled_from(CELLS))
        return "\n".join(map(",".join, lines)).encode()
    return bytes(draw(damaged(content)))


@pytest.fixture(scope="module")
def two_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two equal snapshots."""
    folder = tmp_path_factory.mktemp("snapshots")
    for side in ("left", "right"):
        write_snapshot(folder / side, MODELS)
    return folder


@pytest.fixture(scope="module")
def whole(two_snapshots: Path) -> dict[str, bytes]:
    return files_of(two_snapshots / "left")


@pytest.fixture(autouse=True)
def inside(two_snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two_snapshots)


def spoil(data: st.DataObject, whole: dict[str, bytes]) -> None:
    """Write the left record anew with one of its files spoilt."""
    name = data.draw(st.sampled_from(sorted(whole)))
    for each, content in whole.items():
        Path("left", each).write_bytes(data.draw(spoilt_file(content, each)) if each == name else content)


@fuzz(60)
@given(data=st.data())
def test_any_record_can_be_compared(whole: dict[str, bytes], data: st.DataObject) -> None:
    spoil(data, whole)

    def use() -> None:
        found = compare.compare_snapshots(FolderSnapshot(Path("left")), FolderSnapshot(Path("right")))
        assert compare.to_markdown(found)

    refusal(use)


@fuzz(60)
@given(data=st.data())
def test_any_record_can_be_judged(whole: dict[str, bytes], data: st.DataObject) -> None:
    spoil(data, whole)

    def use() -> None:
        json.dumps(claims.evaluate_claims(FolderSnapshot(Path("left")), {"it": CLAIM}, 0).as_dict(), allow_nan=False)

    refusal(use)


@fuzz(60)
@given(data=st.data())
def test_any_record_can_be_aggregated(whole: dict[str, bytes], data: st.DataObject) -> None:
    spoil(data, whole)
    sides = [FolderSnapshot(Path("left")), FolderSnapshot(Path("right"))]

    def use() -> None:
        json.dumps(aggregation.aggregate(sides, {"it": CLAIM}, require_same_setup=False).as_dict(), allow_nan=False)

    refusal(use)


@fuzz(60)
@given(content=st.binary(max_size=60) | damaged(b'a,b\n1,"2 ""x"""\n') | damaged(b'{"a": [1, 2.5e3, "\\u00e9"]}'))
def test_any_bytes_of_a_file(content: bytes) -> None:
    Path("file").write_bytes(content)
    for read in (snapshots.read_json, snapshots.read_csv):
        refusal(lambda read=read: read(FolderSnapshot(Path()), Path("file")))  # type: ignore[misc]


@fuzz(10)
@given(data=st.data())
def test_a_refused_comparison_writes_nothing(advmoe: Advmoe, whole: dict[str, bytes], data: st.DataObject) -> None:
    spoil(data, whole)
    before = files_of(Path())
    if ended(advmoe("report", "left", "right")) is not None:
        assert files_of(Path()) == before
    nothing_partial(Path())


# ---- the report and `advmoe results` ---------------------------------------------------------------------------------

REPORTED = made_up()
SHOWN = ("metrics/evaluate", "metrics/poison-runs/badnets.json", "metrics/membership")


@fuzz(6)
@given(data=st.data())
def test_any_record_can_be_reported(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(each for each in REPORTED.content if not each.endswith(".png"))))
    record = REPORTED.replaced(name, data.draw(spoilt_file(REPORTED.content[name], name)))

    def use() -> None:
        content = build_content(record)
        assert render_html(content)
        assert render_markdown(content)

    refusal(use)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    copy_inputs(folder)
    for name, content in REPORTED.content.items():
        if name.startswith(SHOWN):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


@fuzz(40)
@given(data=st.data())
def test_any_results_are_shown(
    advmoe: Advmoe, shown: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.chdir(shown)
    names = sorted(each for each in REPORTED.content if each.startswith(SHOWN))
    name = data.draw(st.sampled_from(names))
    (shown / name).write_bytes(data.draw(spoilt_file(REPORTED.content[name], name)))
    try:
        ended(advmoe("results"))
    finally:
        (shown / name).write_bytes(REPORTED.content[name])


# ---- what was found --------------------------------------------------------------------------------------------------


def test_unspoilt_results_are_shown(advmoe: Advmoe, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    ran = advmoe("results")
    assert ended(ran) is None
    assert "poison@badnets" in ran.out


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("metrics/evaluate/mixture.json", {"accuracy": {"clean": {"correct": 1}}}),
        ("metrics/evaluate/mixture.json", {"accuracy": {"clean": [1]}}),
        ("metrics/evaluate/mixture.json", {"model": ["mixture"]}),
        ("metrics/evaluate/mixture.json", {"withheld": None}),
        ("metrics/evaluate.json", {"epsilon": "0.1"}),
        ("metrics/evaluate.json", {"epsilon": 10**400}),
        ("metrics/poison-runs/badnets.json", {"runs": [{}]}),
        ("metrics/poison-runs/badnets.json", {"runs": []}),
        ("metrics/membership/all.json", {"rows": []}),
        ("metrics/membership/all.json", {"rows": [{"leak": None}]}),
    ],
)
def test_results_of_another_form_are_refused(
    advmoe: Advmoe, shown: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(shown)
    Path(name).write_bytes(as_json(json.loads(REPORTED.content[name]) | changes))
    try:
        sentence = ended(advmoe("results"))
    finally:
        Path(name).write_bytes(REPORTED.content[name])
    assert sentence is not None
    assert sentence.startswith("metrics/")


def test_a_report_is_refused_where_accuracies_are_a_word() -> None:
    name = "metrics/evaluate/expert-clean.json"
    record = REPORTED.replaced(name, json.loads(REPORTED.content[name]) | {"accuracy": " "})
    assert refusal(lambda: build_content(record)) is not None


def test_a_report_is_refused_where_epsilon_is_a_word() -> None:
    name = "metrics/evaluate.json"
    record = REPORTED.replaced(name, json.loads(REPORTED.content[name]) | {"epsilon": "\x1f"})
    assert refusal(lambda: build_content(record)) is not None


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_a_finding_whose_status_is_no_word_is_refused(render: Callable[[ReportContent], str]) -> None:
    findings = json.loads(REPORTED.content["metrics/findings.json"])
    findings["claims"]["one"]["status"] = None
    record = REPORTED.replaced("metrics/findings.json", findings)
    assert refusal(lambda: render(build_content(record))) is not None


@pytest.mark.parametrize("name", ["\x1b[31mred", "\u732b"], ids=ascii)
def test_a_name_that_no_font_has_is_drawn_without_a_warning(name: str) -> None:
    path = "metrics/evaluate/baseline-adversarial.json"
    record = REPORTED.replaced(path, json.loads(REPORTED.content[path]) | {"model": name})
    assert name.lstrip("\x1b") in render_html(build_content(record))


def test_a_report_is_refused_where_a_verdict_is_no_word() -> None:
    name = "metrics/verdict.json"
    spoilt_verdict = json.loads(REPORTED.content[name])
    spoilt_verdict["mixture"]["verdict"] = None
    assert refusal(lambda: build_content(REPORTED.replaced(name, spoilt_verdict))) is not None


@pytest.mark.parametrize("name", ["metrics/evaluate/mixture.json", "metrics/poison-runs/badnets.json"])
def test_a_report_is_refused_where_a_key_is_gone(name: str) -> None:
    whole = json.loads(REPORTED.content[name])
    whole.pop("runs", None)
    whole.pop("accuracy", None)
    assert refusal(lambda: build_content(REPORTED.replaced(name, whole))) is not None


def test_a_position_of_thousands_of_digits_is_refused(whole: dict[str, bytes]) -> None:
    name = "metrics/decisions/mixture.csv"
    head, first, *rest = whole[name].decode().splitlines()
    lines = [head, "9" * 5000 + first[first.index(",") :], *rest]
    for each, content in whole.items():
        Path("left", each).write_bytes("\n".join(lines).encode() if each == name else content)
    assert refusal(lambda: claims.evaluate_claims(FolderSnapshot(Path("left")), {"it": CLAIM}, 0)) is not None


@pytest.mark.parametrize(
    "text", ["seed: !!bool x", "[" * 2000, f"seed: 0x{'f' * 9000}"], ids=["tag", "depth", "digits"]
)
def test_params_of_a_record_that_are_no_yaml_are_refused(whole: dict[str, bytes], text: str) -> None:
    for each, content in whole.items():
        Path("left", each).write_bytes(text.encode() if each == "params.yaml" else content)
    assert (
        refusal(lambda: compare.compare_snapshots(FolderSnapshot(Path("left")), FolderSnapshot(Path("right"))))
        is not None
    )

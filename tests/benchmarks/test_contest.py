"""benchmarks.contest: which validation images networks classify correctly, and their differences."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_tiny_mixture
from torch import Tensor, nn

from advmoe.attacks.registry import AttackSettings
from advmoe.core import paths
from advmoe.data import dataset
from advmoe.evaluation import harness
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget
from advmoe.models import classifiers, inference
from advmoe.runtime.machine import generator
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.paired_tests import compare_paired
from benchmarks import contest

CIFAR10_LEDGER = ROOT / "docs/contest-cifar10.json"
DIGITS_LEDGER = ROOT / "docs/contest-digits.json"
OTHER = Path("artifacts/train/other.safetensors")
LEDGER: dict[str, object] = {"dataset": "0", "epsilon": 0.1, "images": 3, "attacks": ["pgd"]}
NETWORK = {"training_flops": 1, "clean": "7", "worst": "0"}


@pytest.fixture
def two(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two untrained mixtures, and attacks of two steps."""
    short = {name: attack.model_copy(update={"steps": 2}) for name, attack in contest.ATTACKS.items()}
    monkeypatch.setattr(contest, "ATTACKS", short)
    save_tiny_mixture(OTHER, seed=1)
    return project


def cells(row: list[str]) -> list[float]:
    return [float(cell.split(" ")[0]) for cell in row[2:4]]


@pytest.mark.usefixtures("two")
def test_the_table_compares_every_network_with_the_first() -> None:
    first, other = contest.table_rows(contest.evaluate_networks([paths.MIXTURE, OTHER]))
    validation = dataset.load(paths.DATASET)["validation"]
    assert (first[0], other[0]) == (str(paths.MIXTURE), str(OTHER))
    assert first[4:] == [""] * 4
    found = [contest.evaluate_network(name, load(name), validation, 0.1) for name in (str(paths.MIXTURE), str(OTHER))]
    for row, each in zip((first, other), found, strict=True):
        assert cells(row) == [round(100 * float(each[kind].double().mean()), 1) for kind in (CLEAN, WORST)]
    paired = compare_paired(found[0][WORST], found[1][WORST], contest.SEED)
    assert other[5:] == [str(paired), f"{paired.only_first} : {paired.only_second}", f"{paired.p:.3f}"]


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Returns the lines of standard error of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["contest", *options])
    with pytest.raises(SystemExit) as ended:
        contest.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


def load(name: str) -> nn.Module:
    return classifiers.load(Path(name)).model


@pytest.mark.usefixtures("two")
def test_clean_correctness_is_that_of_the_network_on_the_validation_split() -> None:
    validation, model = dataset.load(paths.DATASET)["validation"], load(str(paths.MIXTURE))
    found = contest.evaluate_network("mixture", model, validation, 0.1)
    expected: Tensor = inference.predict(model, validation.pixels(), 120).argmax(1) == validation.labels
    assert found[CLEAN].tolist() == expected.tolist()
    assert not (found[WORST] & ~found[CLEAN]).any()
    assert int(found[WORST].sum()) < int(found[CLEAN].sum())


@pytest.mark.usefixtures("two")
def test_the_command_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["contest", str(paths.MIXTURE), str(OTHER)])
    contest.main()
    assert "on 180 validation images, pgd, pgd-margin" in capsys.readouterr().out


@pytest.mark.usefixtures("two")
def test_a_saved_ledger_gives_the_same_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["contest", str(paths.MIXTURE), str(OTHER), "--save", "ledger.json"])
    contest.main()
    said = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["contest", "--ledger", "ledger.json", "--figure", "figure.svg"])
    contest.main()
    assert capsys.readouterr().out == said
    training_flops = classifiers.load(paths.MIXTURE).header.metrics["cost"]["total_training_flops"]
    kept = contest.read_record(Path("ledger.json"))
    assert kept.networks[str(paths.MIXTURE)].training_flops == training_flops
    assert (kept.epsilon, kept.attacks) == (0.1, tuple(contest.ATTACKS))
    assert kept.dataset == dataset.load(paths.DATASET).sha256
    drawn = ET.parse("figure.svg").getroot()  # noqa: S314  (our own)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(drawn.itertext())
    assert str(OTHER) in words
    assert "--series-0: #0a58a8" in words


@pytest.mark.usefixtures("two")
def test_presets_add_attacks_and_images_limits_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []
    measure = harness.evaluate

    def measured(
        target: EvaluationTarget, attacks: Mapping[str, AttackSettings], terms: EvaluationConfig
    ) -> EvaluationResult:
        asked.append((list(attacks), len(target.labels)))
        return measure(target, {name: contest.ATTACKS.get(name, contest.ATTACKS["pgd"]) for name in attacks}, terms)

    monkeypatch.setattr(harness, "evaluate", measured)
    found = contest.evaluate_networks([paths.MIXTURE], ["autoattack", "adaptive"], 7)
    ((names, images),) = asked
    assert {"square", "fab-t", "misrouting", "experts", "gate-frozen", "pgd-margin"} <= set(names)
    assert images == found.images == 7
    assert list(found.attacks) == names


@pytest.mark.parametrize("count", [1, 4, 5, 1500])
def test_packed_bits_are_unpacked_unchanged(count: int) -> None:
    stream = generator("test_contest", count)
    clean, worst = (torch.rand(count, generator=stream) < share for share in (0.7, 0.3))
    network = NETWORK | {"clean": contest.pack_bits(clean), "worst": contest.pack_bits(worst)}
    again = contest.ContestRecord.model_validate(LEDGER | {"images": count, "networks": {"a": network}}).correct("a")
    assert torch.equal(again[CLEAN], clean)
    assert torch.equal(again[WORST], worst)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ("{", "is not a ledger: "),
        ("[]", "is not a ledger: "),
        (LEDGER, "networks: is missing"),
        (LEDGER | {"networks": {}}, "networks: "),
        (LEDGER | {"networks": {"a": NETWORK | {"clean": "8"}}}, "networks.a: has bits for more than 3 images"),
        (LEDGER | {"networks": {"a": NETWORK | {"worst": "x"}}}, "networks.a.worst: "),
        (LEDGER | {"networks": {"a": NETWORK | {"training_flops": None}}}, "networks.a.training_flops: "),
        (LEDGER | {"images": 0, "networks": {"a": NETWORK}}, "images: "),
    ],
)
def test_an_invalid_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: object, expected: str
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(kept if isinstance(kept, str) else json.dumps(kept))
    (said,) = refused(monkeypatch, capsys, "--ledger", str(path))
    assert said.startswith(f"error: {path}: is not a ledger: ")
    assert expected in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["a", "--images", "0"], "--images must be at least 1"),
        (["a", "--ledger", "b"], "either networks or --ledger is required"),
        (["--ledger", "b", "--presets", "adaptive"], "cannot be combined with --ledger"),
        (["--ledger", "b", "--images", "3"], "cannot be combined with --ledger"),
        (["a", "--only", "C1"], "--only needs --figure"),
        (["--ledger", str(CIFAR10_LEDGER), "--figure", "f.svg", "--only", "C1", "C77"], "there is no network C77"),
    ],
)
def test_incompatible_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert expected in refused(monkeypatch, capsys, *options)[-1]
    assert not Path("f.svg").exists()


def rows_of(page: str, letters: str) -> dict[str, list[str]]:
    """Returns the cells of the page's table rows by the name of the run, without bold type."""
    lines = [line.replace("**", "") for line in page.splitlines() if re.match(rf"\| [{letters}]\d+ \|", line)]
    return {
        cells[0].strip("| "): [cell.strip() for cell in cells[1:]] for cells in (line.split(" | ") for line in lines)
    }


def format_p(p: str) -> str:
    """Formats a p-value as on the page."""
    if float(p) < 0.001:
        return "p < 0.001"
    return f"p = {float(p):.2f}" if float(p) >= 0.01 else f"p = {p}"


@pytest.mark.parametrize(("record", "letters", "unit"), [(CIFAR10_LEDGER, "C", 1000), (DIGITS_LEDGER, "SE", 1)])
def test_the_page_agrees_with_the_ledger(record: Path, letters: str, unit: int) -> None:
    """The page has a row for every network of the ledger and no other, with the numbers computed from the decisions."""
    rows = rows_of((ROOT / "docs/contest.md").read_text(), letters)
    found = {row[0].split(" ")[0]: row for row in contest.table_rows(contest.read_record(record))}
    assert list(rows) == list(found)
    for name, (_, training_flops, clean, robust, *behind) in found.items():
        expected_flops = f"{float(training_flops) / unit:.2f}" if unit > 1 else training_flops
        assert rows[name][1:4] == [expected_flops, clean, robust]
        if any(behind):
            on_clean, on_robust, pairs, p = behind
            assert rows[name][4:6] == [on_clean, f"{on_robust}, {pairs}, {format_p(p)}"]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("path", "expected"), [("nothing.safetensors", "no such file"), ("strange", "trained on other data")]
)
def test_a_file_that_is_missing_or_of_other_data_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str, expected: str
) -> None:
    if path == "strange":
        path = str(OTHER)
        loaded = dataset.load
        monkeypatch.setattr(dataset, "load", lambda file: other_data(loaded(file)))
    (said,) = refused(monkeypatch, capsys, path)
    assert said.startswith(f"error: {path}: ")
    assert expected in said


@pytest.mark.usefixtures("two")
def test_a_network_without_training_cost_is_refused_before_any_attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, data = classifiers.load(OTHER), dataset.load(paths.DATASET)
    about = (old.model, old.about.architecture, data.facts)
    classifiers.save(OTHER, *about, params={}, inputs=old.header.inputs, seed=0, metrics={}, seconds=0.0)
    monkeypatch.setattr(harness, "evaluate", None)
    (said,) = refused(monkeypatch, capsys, str(paths.MIXTURE), str(OTHER))
    assert said.startswith(f"error: {OTHER}: does not hold its training cost")


def other_data(data: dataset.Dataset) -> dataset.Dataset:
    return dataset.Dataset(data.splits, data.facts, "1" * 64)

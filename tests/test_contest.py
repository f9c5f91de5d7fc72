"""The contest's yardstick: which validation images networks get right, and how far they are apart."""

import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_mixture
from torch import Tensor, nn

from advmoe import classifiers, engine, paths
from advmoe.attacks.catalogue import AnyAttack
from advmoe.data import dataset
from advmoe.evaluation import harness
from advmoe.evaluation.harness import CLEAN, WORST, Measured, Target, Terms
from advmoe.evaluation.paired import compare
from advmoe.machine import generator
from benchmarks import contest

OTHER = Path("artifacts/train/other.safetensors")
TWO, THREE = (f'{{"training_flops": 1, "images": {images}, "clean": "1", "worst": "0"}}' for images in (2, 3))
TOO_LONG = '{"a": {"training_flops": 1, "images": 2, "clean": "ff", "worst": "0"}}'


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
def test_every_network_stands_beside_the_first_on_validation_images() -> None:
    first, other = contest.standings(contest.measured([paths.MIXTURE, OTHER]))
    validation = dataset.load(paths.DATASET)["validation"]
    assert (first[0], other[0]) == (str(paths.MIXTURE), str(OTHER))
    assert first[4:] == [""] * 4
    found = [contest.right(name, load(name), validation, 0.1) for name in (str(paths.MIXTURE), str(OTHER))]
    for row, each in zip((first, other), found, strict=True):
        assert cells(row) == [round(100 * float(each[kind].double().mean()), 1) for kind in (CLEAN, WORST)]
    paired = compare(found[0][WORST], found[1][WORST], contest.SEED)
    assert other[5:] == [str(paired), f"{paired.only_first} : {paired.only_second}", f"{paired.p:.3f}"]


def load(name: str) -> nn.Module:
    return classifiers.load(Path(name)).model


@pytest.mark.usefixtures("two")
def test_what_is_right_when_clean_is_what_the_network_says_of_the_validation_split() -> None:
    validation, model = dataset.load(paths.DATASET)["validation"], load(str(paths.MIXTURE))
    found = contest.right("mixture", model, validation, 0.1)
    expected: Tensor = engine.predict(model, validation.pixels(), 120).argmax(1) == validation.labels
    assert found[CLEAN].tolist() == expected.tolist()
    assert not (found[WORST] & ~found[CLEAN]).any()
    assert int(found[WORST].sum()) < int(found[CLEAN].sum())


@pytest.mark.usefixtures("two")
def test_the_command_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["contest", str(paths.MIXTURE), str(OTHER)])
    contest.main()
    assert "on validation images" in capsys.readouterr().out


@pytest.mark.usefixtures("two")
def test_what_was_kept_gives_the_same_table_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["contest", str(paths.MIXTURE), str(OTHER), "--save", "ledger.json"])
    contest.main()
    said = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["contest", "--ledger", "ledger.json", "--figure", "figure.svg"])
    contest.main()
    assert capsys.readouterr().out == said
    spent = classifiers.load(paths.MIXTURE).header.metrics["cost"]["total_training_flops"]
    assert contest.read(Path("ledger.json"))[str(paths.MIXTURE)].training_flops == spent
    drawn = ET.parse("figure.svg").getroot()  # noqa: S314  (our own)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(drawn.itertext())
    assert str(OTHER) in words
    assert "--series-0: #0a58a8" in words


@pytest.mark.usefixtures("two")
def test_presets_ask_harder_and_of_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []
    measure = harness.measure

    def measured(target: Target, attacks: Mapping[str, AnyAttack], terms: Terms) -> Measured:
        asked.append((list(attacks), len(target.labels)))
        return measure(target, {name: contest.ATTACKS.get(name, contest.ATTACKS["pgd"]) for name in attacks}, terms)

    monkeypatch.setattr(harness, "measure", measured)
    (found,) = contest.measured([paths.MIXTURE], ["autoattack", "adaptive"], 7).values()
    ((names, images),) = asked
    assert {"square", "fab-t", "misrouting", "experts", "gate-frozen", "pgd-margin"} <= set(names)
    assert images == found.images == 7


def test_no_images_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["contest", "a", "--images", "0"])
    with pytest.raises(SystemExit) as ended:
        contest.main()
    assert ended.value.code == 2


@pytest.mark.parametrize("count", [1, 4, 5, 1500])
def test_which_images_are_right_survives_being_kept(count: int) -> None:
    stream = generator("test_contest", count)
    right = {kind: torch.rand(count, generator=stream) < 0.3 for kind in (CLEAN, WORST)}
    again = contest.Standing.of(right, 12).correct
    assert all(torch.equal(again[kind], right[kind]) for kind in right)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"a": 3}', '{"a": {"images": 2}}', f'{{"a": {TWO}, "b": {THREE}}}', TOO_LONG]
)
def test_what_is_no_ledger_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "ledger.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["contest", "--ledger", str(tmp_path / "ledger.json")])
    with pytest.raises(SystemExit) as ended:
        contest.main()
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {tmp_path}/ledger.json: ")


def test_the_ledger_on_record_is_read_and_says_what_the_page_says() -> None:
    page = Path("docs/contest.md").read_text()
    found = contest.read(Path("docs/contest-cifar10.json"))
    for row in contest.standings(found):
        cells = [cell for cell in row[2:6] if cell]
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row[0].split(' ')[0]} |")]
        assert all(cell.replace("+0.0 [+0.0, +0.0]", "") in line for cell in cells), (row, line)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("path", "expected"), [("nothing.safetensors", "no such file"), ("strange", "not trained on")])
def test_a_file_that_is_missing_or_of_other_data_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str, expected: str
) -> None:
    if path == "strange":
        path = str(OTHER)
        loaded = dataset.load
        monkeypatch.setattr(dataset, "load", lambda file: other_data(loaded(file)))
    monkeypatch.setattr(sys, "argv", ["contest", path])
    with pytest.raises(SystemExit) as ended:
        contest.main()
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {path}: ")
    assert expected in said


def other_data(data: dataset.Dataset) -> dataset.Dataset:
    return dataset.Dataset(data.splits, data.facts, "1" * 64)

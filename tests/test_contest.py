"""The contest's yardstick: which validation images networks get right, and how far they are apart."""

import sys
from pathlib import Path

import pytest
from conftest import save_tiny_mixture
from torch import Tensor, nn

from advmoe import classifiers, engine, paths
from advmoe.data import dataset
from advmoe.evaluation.harness import CLEAN, WORST
from advmoe.evaluation.paired import compare
from benchmarks import contest

OTHER = Path("artifacts/train/other.safetensors")


@pytest.fixture
def two(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two untrained mixtures, and attacks of two steps."""
    short = {name: attack.model_copy(update={"steps": 2}) for name, attack in contest.ATTACKS.items()}
    monkeypatch.setattr(contest, "ATTACKS", short)
    save_tiny_mixture(OTHER, seed=1)
    return project


def cells(row: list[str]) -> list[float]:
    return [float(cell.split(" ")[0]) for cell in row[1:3]]


@pytest.mark.usefixtures("two")
def test_every_network_stands_beside_the_first_on_validation_images() -> None:
    first, other = contest.standings([paths.MIXTURE, OTHER])
    validation = dataset.load(paths.DATASET)["validation"]
    assert (first[0], other[0]) == (str(paths.MIXTURE), str(OTHER))
    assert first[3:] == [""] * 4
    found = [contest.right(name, load(name), validation, 0.1) for name in (str(paths.MIXTURE), str(OTHER))]
    for row, each in zip((first, other), found, strict=True):
        assert cells(row) == [round(100 * float(each[kind].double().mean()), 1) for kind in (CLEAN, WORST)]
    paired = compare(found[0][WORST], found[1][WORST], contest.SEED)
    assert other[4:] == [str(paired), f"{paired.only_first} : {paired.only_second}", f"{paired.p:.3f}"]


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

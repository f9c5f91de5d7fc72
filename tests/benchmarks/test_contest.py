"""The contest's yardstick: which validation images networks get right, and how far they are apart."""

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

from advmoe.attacks.registry import AnyAttack
from advmoe.core import paths
from advmoe.data import dataset
from advmoe.evaluation import harness
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget
from advmoe.models import classifiers, inference
from advmoe.runtime.machine import generator
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.paired_tests import compare
from benchmarks import contest

ON_RECORD = ROOT / "docs/contest-cifar10.json"
SCREENED = ROOT / "docs/contest-digits.json"
OTHER = Path("artifacts/train/other.safetensors")
KEPT: dict[str, object] = {"dataset": "0", "epsilon": 0.1, "images": 3, "attacks": ["pgd"]}
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


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *asked: str) -> list[str]:
    """What the command says, line by line, as it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["contest", *asked])
    with pytest.raises(SystemExit) as ended:
        contest.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


def load(name: str) -> nn.Module:
    return classifiers.load(Path(name)).model


@pytest.mark.usefixtures("two")
def test_what_is_right_when_clean_is_what_the_network_says_of_the_validation_split() -> None:
    validation, model = dataset.load(paths.DATASET)["validation"], load(str(paths.MIXTURE))
    found = contest.right("mixture", model, validation, 0.1)
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
    kept = contest.read(Path("ledger.json"))
    assert kept.networks[str(paths.MIXTURE)].training_flops == spent
    assert (kept.epsilon, kept.attacks) == (0.1, tuple(contest.ATTACKS))
    assert kept.dataset == dataset.load(paths.DATASET).sha256
    drawn = ET.parse("figure.svg").getroot()  # noqa: S314  (our own)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(drawn.itertext())
    assert str(OTHER) in words
    assert "--series-0: #0a58a8" in words


@pytest.mark.usefixtures("two")
def test_presets_ask_harder_and_of_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []
    measure = harness.evaluate

    def measured(
        target: EvaluationTarget, attacks: Mapping[str, AnyAttack], terms: EvaluationConfig
    ) -> EvaluationResult:
        asked.append((list(attacks), len(target.labels)))
        return measure(target, {name: contest.ATTACKS.get(name, contest.ATTACKS["pgd"]) for name in attacks}, terms)

    monkeypatch.setattr(harness, "evaluate", measured)
    found = contest.measured([paths.MIXTURE], ["autoattack", "adaptive"], 7)
    ((names, images),) = asked
    assert {"square", "fab-t", "misrouting", "experts", "gate-frozen", "pgd-margin"} <= set(names)
    assert images == found.images == 7
    assert list(found.attacks) == names


@pytest.mark.parametrize("count", [1, 4, 5, 1500])
def test_which_images_are_right_survives_being_kept(count: int) -> None:
    stream = generator("test_contest", count)
    clean, worst = (torch.rand(count, generator=stream) < share for share in (0.7, 0.3))
    network = NETWORK | {"clean": contest.packed(clean), "worst": contest.packed(worst)}
    again = contest.Ledger.model_validate(KEPT | {"images": count, "networks": {"a": network}}).correct("a")
    assert torch.equal(again[CLEAN], clean)
    assert torch.equal(again[WORST], worst)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ("{", "is no ledger: "),
        ("[]", "is no ledger: "),
        (KEPT, "networks: is missing"),
        (KEPT | {"networks": {}}, "networks: "),
        (KEPT | {"networks": {"a": NETWORK | {"clean": "8"}}}, "networks.a: tells of more than 3 images"),
        (KEPT | {"networks": {"a": NETWORK | {"worst": "x"}}}, "networks.a.worst: "),
        (KEPT | {"networks": {"a": NETWORK | {"training_flops": None}}}, "networks.a.training_flops: "),
        (KEPT | {"images": 0, "networks": {"a": NETWORK}}, "images: "),
    ],
)
def test_what_is_no_ledger_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: object, expected: str
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(kept if isinstance(kept, str) else json.dumps(kept))
    (said,) = refused(monkeypatch, capsys, "--ledger", str(path))
    assert said.startswith(f"error: {path}: is no ledger: ")
    assert expected in said


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["a", "--images", "0"], "--images is at least 1"),
        (["a", "--ledger", "b"], "either networks or --ledger"),
        (["--ledger", "b", "--presets", "adaptive"], "asked of networks"),
        (["--ledger", "b", "--images", "3"], "asked of networks"),
        (["a", "--only", "C1"], "--only chooses what --figure draws"),
        (["--ledger", str(ON_RECORD), "--figure", "f.svg", "--only", "C1", "C77"], "there is no network C77"),
    ],
)
def test_questions_that_make_no_sense_are_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[str], expected: str
) -> None:
    assert expected in refused(monkeypatch, capsys, *asked)[-1]
    assert not Path("f.svg").exists()


def rows_of(page: str, letters: str) -> dict[str, list[str]]:
    """The cells of a ledger's rows by the name of the run, without bold type."""
    lines = [line.replace("**", "") for line in page.splitlines() if re.match(rf"\| [{letters}]\d+ \|", line)]
    return {
        cells[0].strip("| "): [cell.strip() for cell in cells[1:]] for cells in (line.split(" | ") for line in lines)
    }


def in_words(p: str) -> str:
    """A p-value as the page writes it."""
    if float(p) < 0.001:
        return "p < 0.001"
    return f"p = {float(p):.2f}" if float(p) >= 0.01 else f"p = {p}"


@pytest.mark.parametrize(("record", "letters", "unit"), [(ON_RECORD, "C", 1000), (SCREENED, "SE", 1)])
def test_the_page_tells_what_the_ledger_on_record_tells(record: Path, letters: str, unit: int) -> None:
    """Every network has its row, and every row its network; every number is the one that the decisions give."""
    rows = rows_of((ROOT / "docs/contest.md").read_text(), letters)
    found = {row[0].split(" ")[0]: row for row in contest.standings(contest.read(record))}
    assert list(rows) == list(found)
    for name, (_, spent, clean, robust, *behind) in found.items():
        spending = f"{float(spent) / unit:.2f}" if unit > 1 else spent
        assert rows[name][1:4] == [spending, clean, robust]
        if any(behind):
            on_clean, on_robust, pairs, p = behind
            assert rows[name][4:6] == [on_clean, f"{on_robust}, {pairs}, {in_words(p)}"]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("path", "expected"), [("nothing.safetensors", "no such file"), ("strange", "trained on other data")]
)
def test_a_file_that_is_missing_or_of_other_data_ends_in_a_sentence(
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
def test_a_network_that_keeps_no_account_is_refused_before_any_attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, data = classifiers.load(OTHER), dataset.load(paths.DATASET)
    about = (old.model, old.about.architecture, data.facts)
    classifiers.save(OTHER, *about, params={}, inputs=old.header.inputs, seed=0, metrics={}, seconds=0.0)
    monkeypatch.setattr(harness, "evaluate", None)
    (said,) = refused(monkeypatch, capsys, str(paths.MIXTURE), str(OTHER))
    assert said.startswith(f"error: {OTHER}: does not say what its training cost")


def other_data(data: dataset.Dataset) -> dataset.Dataset:
    return dataset.Dataset(data.splits, data.facts, "1" * 64)

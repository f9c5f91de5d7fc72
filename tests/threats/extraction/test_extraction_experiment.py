"""Whole studies on a tiny victim: what is asked, what is trained on what, what lies on disk, and what is refused."""

import contextlib
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXTRACT, LEARNING, Advmoe, sentence
from torch import Tensor, nn

from advmoe.core import artifacts, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import load_section, validate
from advmoe.data import dataset
from advmoe.data.dataset import image_digests
from advmoe.models import classifiers, inference
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.extraction import experiment, metrics, prada, report, surrogate, transfer_set, victims
from advmoe.threats.extraction.config import ExtractSection, Study
from advmoe.threats.extraction.experiment import ExtractionExperiment
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.threats.extraction.victims import Victim
from advmoe.training import trainer
from advmoe.training.job import TrainingResult
from stages import extract as stage

TINY = {"kind": "cnn", "width": 2}
KNOCKOFF: dict[str, Any] = {
    "attack": {"kind": "knockoff", "pool": {"kind": "noise", "images": 30}},
    "answers": ["soft"],
    "budgets": [8, 20],
    "victims": ["mixture"],
    "surrogates": ["same"],
    "seeds": [0],
}
JBDA = KNOCKOFF | {"attack": {"kind": "jbda", "seeds": 5, "doublings": 2, "step": 0.1}, "answers": ["top1"]}
SECTION: dict[str, Any] = EXTRACT | {
    "images": 24,
    "noise": 10,
    "surrogates": {"same": TINY, "other": {"kind": "cnn", "width": 3}},
    "recipe": LEARNING | {"epochs": 2, "batch_size": 8},
    "attacks": {"knockoff": KNOCKOFF, "jbda": JBDA},
}

Edit = Callable[[dict[str, Any]], None]
FOLDER = Path("artifacts/extract/knockoff")


@pytest.fixture
def pipeline(project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The small project with an untrained mixture and baseline, and an extraction section of seconds."""
    edit({"extract": SECTION})
    monkeypatch.setattr(artifacts, "_git", lambda *_: None)  # asked twice for every file, and this is no repository
    experiment._dataset.cache_clear()
    yield project
    experiment._dataset.cache_clear()


@pytest.fixture
def tiny(pipeline: Path) -> Path:
    """An untrained baseline beside the mixture."""
    del pipeline
    data, path = dataset.load(paths.DATASET), paths.artifact("baseline", "tiny")
    architecture = PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="cnn", width=2))
    model = classifiers.build(architecture, data.facts, 7)
    classifiers.save(path, model, architecture, data.facts, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    return path


def make_case(name: str = "knockoff", folder: Path = FOLDER, **changes: Any) -> ExtractionExperiment:
    """A study of params.yaml with a few things changed."""
    section = load_section("extract", ExtractSection)
    made = validate(section.named(name).model_dump() | changes, Study, "test")
    return ExtractionExperiment(name, made, section.common, 0, 0.1, None, folder)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content, but for what differs between two runs of the same work."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".run.json")
    }


@dataclass
class Lesson:
    """One surrogate as it was trained: in which phase, by which name, seed and answers, from which start, and which
    files were there.
    """

    phase: str
    name: str
    seed: int
    known: TransferSet
    start: nn.Module
    began: dict[str, Tensor]
    end: nn.Module
    written: list[str]


class Lessons:
    """Spies on the training of surrogates; `phase` is the method of the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[Lesson] = []
        self.phase = ""
        starts: list[tuple[nn.Module, dict[str, Tensor]]] = []
        train, fresh = surrogate.train, surrogate.build

        def made(*arguments: Any) -> nn.Module:
            network = fresh(*arguments)
            starts.append((network, {name: tensor.clone() for name, tensor in network.state_dict().items()}))
            return network

        def taught(
            name: str, backbone: BackboneSettings, known: TransferSet, *rest: Any, seed: int, **more: Any
        ) -> TrainingResult:
            before = len(starts)
            there = sorted(str(path) for path in Path().rglob("*.safetensors"))
            trained = train(name, backbone, known, *rest, seed=seed, **more)
            ((start, began),) = starts[before:]  # one new network for each lesson
            self.all.append(Lesson(self.phase, name, seed, known, start, began, trained.model, there))
            return trained

        monkeypatch.setattr(surrogate, "build", made)
        monkeypatch.setattr(surrogate, "train", taught)
        for phase in ("query_victim", "train_controls", "train_surrogates"):
            monkeypatch.setattr(experiment.ExtractionRun, phase, self._watched(phase))

    def _watched(self, phase: str) -> Callable[..., Any]:
        real = getattr(experiment.ExtractionRun, phase)

        def watched(*arguments: Any) -> Any:
            self.phase = phase
            return real(*arguments)

        return watched

    def of(self, phase: str) -> list[Lesson]:
        return [lesson for lesson in self.all if lesson.phase == phase]


class Questions:
    """Spies on everything that victims are asked through their small interface."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[Tensor] = []
        load = victims.load

        def loaded(*arguments: Any) -> Victim:
            victim = load(*arguments)

            def ask(images: Tensor) -> Tensor:
                self.batches.append(images.clone())
                return victim.query(images)

            return Victim(victim.name, victim.identity, ask, victim.model, victim.cache)

        monkeypatch.setattr(victims, "load", loaded)

    @property
    def images(self) -> Tensor:
        return torch.cat(self.batches)


def weights(path: Path) -> dict[str, Tensor]:
    return classifiers.state_dict_of(classifiers.load(path).model)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# ---- the stage


def test_the_stage_leaves_all_its_files(tiny: Path, edit: Edit) -> None:
    del tiny
    changes = {"victims": ["mixture", "tiny"], "answers": ["soft", "top1"], "surrogates": ["same", "other"]}
    edit({f"extract.attacks.knockoff.{name}": value for name, value in changes.items()})
    stage.run("knockoff")
    names = {f"control-seed-0/{network}.safetensors" for network in ("same", "other")}
    for title in ("mixture-soft", "mixture-top1", "tiny-soft", "tiny-top1"):
        names |= {f"{title}-seed-0.safetensors"}
        names |= {f"{title}-seed-0/{end}.safetensors" for end in ("same-8", "same-20", "other-8", "other-20")}
    assert set(tree(FOLDER)) == names
    head = json.loads(Path("metrics/extract/knockoff.json").read_text())
    assert (head["attack"], head["images"], head["epsilon"]) == ("knockoff", 24, 0.1)
    assert set(head["mixture"]) == {"none", "soft", "top1"}
    assert set(head["tiny"]["soft"]["other"]) == {"8", "20"}
    rows, images = report.read(Path("metrics/extract-runs/knockoff.json"))
    assert (len(rows), images) == (2 * (2 + 2 * 2 * 2), 24)
    for row in rows:
        assert ("d_fidelity" in row.metrics) == (row.answers != report.CONTROL)
        assert row.query_stats.get("queries_used", 0) == row.budget
    with Path("plots/extract/knockoff/curve.csv").open() as file:
        assert [line["queries"] for line in csv.DictReader(file)] == ["0", "8", "20"]


def test_surrogates_are_classifiers_like_any_other(pipeline: Path) -> None:
    del pipeline
    stage.run("knockoff")
    path = FOLDER / "mixture-soft-seed-0/same-20.safetensors"
    found = classifiers.load(path)
    assert found.about.architecture == PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="cnn", width=2))
    assert (
        found.header.inputs["transfer set"] == artifacts.load(FOLDER / "mixture-soft-seed-0.safetensors").header.sha256
    )
    split = dataset.load(paths.DATASET)["test"].first(24)
    predicted = inference.predict(found.model, split.pixels(), 200).argmax(1)
    rows, _ = report.read(Path("metrics/extract-runs/knockoff.json"))
    assert rows[-1].metrics["task_acc"].correct == int((predicted == split.labels).sum())
    mixture = inference.predict(classifiers.load(paths.MIXTURE).model, split.pixels(), 200).argmax(1)
    assert rows[-1].metrics["fidelity"].correct == int((predicted == mixture).sum())


@pytest.mark.parametrize("name", ["knockoff", "jbda"])
def test_a_study_is_repeated_bit_for_bit(pipeline: Path, name: str) -> None:
    places = []
    for number in (1, 2):
        folder = pipeline / f"run-{number}"
        experiment.run_experiment(make_case(name), OutputPaths.in_folder(folder))
        places.append(tree(folder))
    assert places[0] == places[1]
    assert len(places[0]) > 5


def test_another_seed_asks_and_learns_something_else(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    lessons = Lessons(monkeypatch)
    rows = experiment.run(make_case(seeds=(0, 1)))
    assert [row.seed_offset for row in rows] == [0, 0, 0, 1, 1, 1]
    first, second = (transfer_set.load(FOLDER / f"mixture-soft-seed-{added}.safetensors") for added in (0, 1))
    assert not torch.equal(first.images, second.images)
    ends = [classifiers.state_dict_of(lesson.end) for lesson in lessons.of("train_controls")]
    assert not equal(*ends)


# ---- asked once, saved, then trained on


@pytest.mark.parametrize("name", ["knockoff", "jbda"])
def test_surrogates_learn_the_saved_transfer_set_and_nothing_else(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    del pipeline
    lessons = Lessons(monkeypatch)
    case = make_case(name, Path("artifacts/extract") / name)
    experiment.run(case)
    (path,) = case.folder.glob("*.safetensors")
    saved = transfer_set.load(path)
    learned = lessons.of("train_surrogates")
    assert [len(lesson.known.images) for lesson in learned] == [8, 20]
    for lesson in learned:
        assert str(path) in lesson.written  # saved before anything learns from it
        count = len(lesson.known.images)
        assert torch.equal(lesson.known.images, saved.images[:count])
        assert torch.equal(lesson.known.answers, saved.answers[:count])


def test_the_log_on_disk_is_what_the_victim_was_asked(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    questions = Questions(monkeypatch)
    experiment.run(make_case("jbda", FOLDER))
    read = artifacts.load(FOLDER / "mixture-top1-seed-0.safetensors", transfer_set.KIND)
    log = [bytes(row.tolist()).hex() for row in read.tensors["log"]]
    assert log == image_digests(read.tensors["images"])
    # the thief's twenty are asked first, then the evaluation: its test images and ten of noise
    asked, exam = image_digests(questions.images), dataset.load(paths.DATASET)["test"].first(24)
    assert asked[:20] == log
    assert asked[20:44] == image_digests(exam.images)
    assert len(asked) == 20 + 24 + 10
    assert read.header.about == {"attack": "jbda", "answers": "top1", "victim": "mixture"}
    assert read.tensors["answers"].sum(1).tolist() == [1.0] * 20


@pytest.mark.parametrize(("epochs", "crop"), [(1, 0), (4, 2)], ids=["once", "augmented"])
def test_neither_epochs_nor_augmentation_cost_queries(
    pipeline: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch, epochs: int, crop: int
) -> None:
    """Answers are asked for once; were augmented images asked anew, every epoch would cost the budget again."""
    del pipeline
    edit({"extract.recipe.epochs": epochs, "extract.recipe.augmentation.crop": crop})
    questions = Questions(monkeypatch)
    rows = experiment.run(make_case())
    assert len(questions.images) == 24 + 10 + 20  # the evaluation, its noise, the largest budget
    assert len(set(image_digests(questions.images))) == len(questions.images)
    assert [row.query_stats.get("queries_used", 0) for row in rows] == [0, 8, 20]


def test_without_augmentation_only_images_with_a_paid_answer_are_learned(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del pipeline
    lessons, seen, step = Lessons(monkeypatch), list[tuple[str, Tensor]](), trainer.Trainer.step

    def watched(run: trainer.Trainer, images: Tensor, labels: Tensor) -> Tensor:
        seen.append((lessons.phase, (images * 255).round().to(torch.uint8)))
        return step(run, images, labels)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    experiment.run(make_case())
    paid = set(image_digests(transfer_set.load(FOLDER / "mixture-soft-seed-0.safetensors").images))
    learned = [digest for phase, images in seen if phase == "train_surrogates" for digest in image_digests(images)]
    assert set(learned) == paid
    assert len(learned) == 2 * (8 + 20)  # two epochs of both budgets


def test_small_transfer_sets_are_learned_for_as_many_steps_as_large_ones(
    pipeline: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    del pipeline
    edit({"extract.steps": 40})
    lessons, steps, step = Lessons(monkeypatch), dict[tuple[str, int], int](), trainer.Trainer.step

    def watched(run: trainer.Trainer, images: Tensor, labels: Tensor) -> Tensor:
        key = lessons.phase, len(run.job.dataset["train"])
        steps[key] = steps.get(key, 0) + 1
        return step(run, images, labels)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    experiment.run(make_case())
    (control,) = lessons.of("train_controls")
    own = len(control.known.images)
    # batches of 8: one an epoch, three, and for the control so many that the recipe's two epochs are enough
    assert steps == {
        ("train_surrogates", 8): 40,
        ("train_surrogates", 20): 14 * 3,
        ("train_controls", own): 2 * -(-own // 8),
    }


# ---- every budget from scratch


def test_every_surrogate_starts_fresh(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    lessons = Lessons(monkeypatch)
    experiment.run(make_case(answers=("soft", "top1")))
    learned = lessons.of("train_surrogates")
    assert len(learned) == 4
    assert len({id(lesson.start) for lesson in lessons.all}) == len(lessons.all)
    ends = [classifiers.state_dict_of(lesson.end) for lesson in learned]
    assert not any(equal(ends[0], other) for other in ends[1:])


@pytest.mark.parametrize("name", ["knockoff", "jbda"])
def test_a_surrogate_is_the_same_whether_smaller_budgets_were_trained_before_or_not(pipeline: Path, name: str) -> None:
    several, alone = pipeline / "several", pipeline / "alone"
    experiment.run(make_case(name, several, budgets=(4, 8, 20)))
    experiment.run(make_case(name, alone, budgets=(20,)))
    (path,) = alone.rglob("same-20.safetensors")
    there = several / path.relative_to(alone)
    assert equal(weights(path), weights(there))
    assert not equal(weights(there), weights(there.with_name("same-8.safetensors")))


@pytest.mark.parametrize("name", ["knockoff", "jbda"])
def test_the_control_and_every_surrogate_start_from_the_same_weights(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Otherwise the difference between them would be one of luck, too."""
    del tiny
    lessons = Lessons(monkeypatch)
    names, modes, networks = ("mixture", "tiny"), ("soft", "top1"), ("same", "other")
    experiment.run(make_case(name, victims=names, answers=modes, surrogates=networks, seeds=(0, 1)))
    began: dict[tuple[str, int], list[Lesson]] = {}
    for lesson in lessons.all:
        began.setdefault((lesson.name, lesson.seed), []).append(lesson)
    assert set(began) == {("same", 0), ("same", 1), ("other", 0), ("other", 1)}
    for alike in began.values():
        assert [lesson.phase for lesson in alike].count("train_controls") == 2
        assert [lesson.phase for lesson in alike].count("train_surrogates") == 2 * 2 * 2
        assert all(equal(alike[0].began, lesson.began) for lesson in alike)
        bought = [lesson.end.state_dict() for lesson in alike if lesson.phase == "train_surrogates"]
        assert not any(equal(bought[0], other) for other in bought[1:])
    first = [alike[0].began for alike in began.values()]
    assert not any(equal(first[0], other) for other in first[1:])


def test_budgets_are_trained_in_the_same_way_in_any_order(pipeline: Path) -> None:
    for folder, budgets in ((pipeline / "up", (8, 20)), (pipeline / "down", (20, 8))):
        experiment.run(make_case(folder=folder, budgets=budgets))
    up, down = tree(pipeline / "up"), tree(pipeline / "down")
    assert up.keys() == down.keys()
    for name in up:
        if name.endswith(("same-8.safetensors", "same-20.safetensors")):
            assert equal(weights(pipeline / "up" / name), weights(pipeline / "down" / name))


def test_the_control_never_asks_and_learns_the_attackers_own_labels(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del pipeline
    lessons = Lessons(monkeypatch)
    rows = experiment.run(make_case())
    (control,) = lessons.of("train_controls")
    pool = dataset.load(paths.DATASET)["pool"]
    assert set(image_digests(control.known.images)) <= set(image_digests(pool.images))
    assert len(control.known.images) > 260
    assert control.known.queries.sum() == 0
    label = dict(zip(image_digests(pool.images), pool.labels.tolist(), strict=True))
    assert control.known.answers.argmax(1).tolist() == [label[each] for each in image_digests(control.known.images)]
    assert (rows[0].answers, rows[0].budget, rows[0].query_stats) == (report.CONTROL, 0, {})


@pytest.mark.parametrize("names", [("mixture", "tiny"), ("tiny", "mixture")], ids=["mixture first", "tiny first"])
def test_controls_know_nothing_of_a_victim_and_are_written_once_for_all_of_them(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    del tiny
    lessons, written, save = Lessons(monkeypatch), list[str](), classifiers.save

    def watched(path: Path, *rest: Any, **keywords: Any) -> Any:
        written.append(str(path.relative_to(FOLDER)))
        return save(path, *rest, **keywords)

    monkeypatch.setattr(classifiers, "save", watched)
    rows = experiment.run(make_case(victims=names, seeds=(0, 1), surrogates=("same", "other")))
    assert len(written) == len(set(written)), "a file was written twice"
    controls = [f"control-seed-{added}/{network}.safetensors" for added in (0, 1) for network in ("same", "other")]
    assert [name for name in written if name.startswith("control")] == controls
    ends = [
        (lesson.name, lesson.seed, classifiers.state_dict_of(lesson.end)) for lesson in lessons.of("train_controls")
    ]
    assert len(ends) == 8
    for name, seed, end in ends:
        assert equal(end, weights(FOLDER / f"control-seed-{seed}/{name}.safetensors"))
    # every victim has its rows all the same
    found = [(row.victim, row.surrogate, row.seed_offset) for row in rows if row.answers == report.CONTROL]
    assert found == [(victim, network, added) for victim in names for added in (0, 1) for network in ("same", "other")]


def test_the_victim_is_evaluated_once_and_after_all_queries(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    lessons, phases, sheet = Lessons(monkeypatch), list[tuple[str, int]](), metrics.victim_answers

    def watched(*arguments: Any) -> Any:
        phases.append((lessons.phase, len(list(FOLDER.glob("mixture-*.safetensors")))))
        return sheet(*arguments)

    monkeypatch.setattr(metrics, "victim_answers", watched)
    experiment.run(make_case(answers=("soft", "top1")))
    assert phases == [("train_controls", 2)]  # both answer modes are on disk


@pytest.mark.parametrize(
    ("alarm", "expected"),
    [(None, [None, None]), (5, [5, 5]), (8, [8, 8]), (9, [None, 9]), (20, [None, 20])],
    ids=str,
)
def test_a_budget_smaller_than_the_alarm_would_not_have_been_noticed(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, alarm: int | None, expected: list[int | None]
) -> None:
    del pipeline
    monkeypatch.setattr(prada, "queries_until_alarm", lambda images, *_: alarm if len(images) == 20 else 24)
    control, *rows = experiment.run(make_case())
    assert control.query_stats == {}
    assert [row.query_stats["alarm_after"] for row in rows] == expected
    # the honest user asks about all test images, whatever the thief's budget
    assert [(row.query_stats["honest_alarm_after"], row.query_stats["honest_queries"]) for row in rows] == [
        (24, 24)
    ] * 2


def test_the_alarm_of_every_budget_is_the_one_of_its_queries_alone(pipeline: Path, edit: Edit) -> None:
    del pipeline
    edit({"extract.detector": {"delta": 0.98, "least": 3, "every": 5}})
    budgets = (4, 8, 14, 20)
    rows = experiment.run(make_case("jbda", FOLDER, budgets=budgets))[1:]
    saved = transfer_set.load(FOLDER / "mixture-top1-seed-0.safetensors")
    detector = load_section("extract", ExtractSection).detector
    alone = [
        prada.queries_until_alarm(saved.images[:budget], saved.answers[:budget].argmax(1), detector)
        for budget in budgets
    ]
    assert [row.query_stats["alarm_after"] for row in rows] == alone
    assert alone[0] is None
    assert alone[-1] is not None


def test_every_attack_and_answer_mode_meets_the_same_pool(pipeline: Path) -> None:
    experiment.run(make_case(folder=pipeline / "a", answers=("soft", "top1")))
    found = [transfer_set.load(pipeline / f"a/mixture-{mode}-seed-0.safetensors") for mode in ("soft", "top1")]
    assert torch.equal(found[0].images, found[1].images)
    assert torch.equal(found[0].answers.argmax(1), found[1].answers.argmax(1))


def test_no_image_of_the_victims_splits_is_asked_by_the_thief(pipeline: Path) -> None:
    data = dataset.load(paths.DATASET)
    theirs = {digest for name in ("train", "validation", "test") for digest in image_digests(data.splits[name].images)}
    attack = {"kind": "knockoff", "pool": {"kind": "in-distribution"}}
    experiment.run(make_case(folder=pipeline / "own", attack=attack))
    saved = transfer_set.load(pipeline / "own/mixture-soft-seed-0.safetensors")
    assert not set(image_digests(saved.images)) & theirs


def test_a_pool_that_is_the_victims_own_set_is_refused(pipeline: Path) -> None:
    """scikit-learn's digits as a foreign pool: the very images that the mixture was trained on."""
    attack = {"kind": "knockoff", "pool": {"kind": "dataset", "source": {"kind": "digits"}}}
    with pytest.raises(UserError, match=r"the attacker's pool and the victim's train split share \d+ images"):
        experiment.run(make_case(folder=pipeline / "own", attack=attack))
    assert list(pipeline.rglob("mixture-soft*.safetensors")) == []


def test_an_external_network_is_extracted_with_its_own_weights(pipeline: Path) -> None:
    (pipeline / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef factory():\n    torch.manual_seed(1)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()\n"
    )
    (row, *_) = experiment.run(make_case(victims=("mine.py:factory",), budgets=(8,)))
    assert row.victim == "mine"
    assert "white_box_asr" in row.metrics or row.metrics["victim_acc_under_transfer"].correct == 0


ENDPOINT = """
from pathlib import Path

import torch

HERE = Path(__file__).parent


def factory():
    def answer(images):
        with (HERE / "bill").open("a") as bill:
            bill.writelines(bytes(image.flatten().tolist()).hex() + "\\n" for image in images)
        light = images.flatten(1).float().mean(dim=1, keepdim=True) / 255
        return torch.softmax(light * torch.arange(10), dim=1)

    return answer
"""


def bill(folder: Path) -> list[str]:
    """The images that were paid for."""
    return (folder / "bill").read_text().split()


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"budgets": (20,)}, 24 * (2 + 2) + 10),  # clean and signs; crafted on the control and on one surrogate
        ({"budgets": (8, 20)}, 24 * (2 + 3) + 10),
        ({"budgets": (8, 20), "surrogates": ("same", "other")}, 24 * (2 + 2 + 4) + 10),
        ({"answers": ("soft", "top1"), "surrogates": ("same", "other")}, 24 * (2 + 2 + 8) + 10),
    ],
    ids=["one", "budgets", "surrogates", "answers"],
)
def test_the_line_before_says_how_many_images_the_exam_asks(
    pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    most: int,
) -> None:
    (pipeline / "endpoint.py").write_text(ENDPOINT)
    questions = Questions(monkeypatch)
    case = make_case(victims=("endpoint.py:factory",), **changes)
    experiment.run(case)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"endpoint: the evaluation sends up to {most} queries in addition to the budget"
    # what the interface was asked: every answer mode's budget, and the evaluation
    assert len(questions.images) == 20 * len(case.study.answers) + most
    # what was paid for may be less: an image that was asked before is remembered
    paid = bill(pipeline)
    assert len(paid) == len(set(paid)) == len(set(image_digests(questions.images))) <= 20 + most


def test_a_network_of_our_own_costs_nothing_and_no_line_is_said(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del pipeline
    experiment.run(make_case(budgets=(8,)))
    assert "the evaluation sends" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "at_a_time"),
    [
        (("mixture", "tiny"), True),
        (("endpoint.py:factory",), False),
        (("mixture", "endpoint.py:factory"), False),
    ],
    ids=["our own", "endpoint", "both"],
)
def test_victims_whose_answers_cost_money_are_asked_one_after_the_other(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], at_a_time: bool
) -> None:
    """Two processes would not know of each other's answers, and pay for the evaluation twice."""
    del tiny
    Path("endpoint.py").write_text(ENDPOINT)
    spread: list[Sequence[Any]] = []

    def watched(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        spread.append(items)
        return [work(item) for item in items]

    monkeypatch.setattr(experiment, "parallel_map", watched)
    rows = experiment.run(make_case(victims=names, seeds=(0, 1), budgets=(8,)))
    jobs = [(name, added) for name in names for added in (0, 1)]
    assert spread == ([jobs] if at_a_time else [])
    shown = [name.removesuffix(".py:factory") for name in names]
    assert [(row.victim, row.seed_offset) for row in rows] == [
        (name, added) for name in shown for added in (0, 1) for _ in ("control", "bought")
    ]
    if not at_a_time:
        paid = bill(Path())
        assert len(paid) == len(set(paid)), "an image was paid for twice"


FUNCTIONS = """
import torch
from torch import nn


def one():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def other():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.mark.parametrize(
    "names",
    [("two.py:one", "two.py:other"), ("two.py:one", "elsewhere/two.py:one"), ("tiny", "elsewhere/tiny.safetensors")],
    ids=["one file", "two folders", "baseline and file"],
)
def test_two_victims_are_never_taken_for_two_seeds_of_one(tiny: Path, names: tuple[str, str]) -> None:
    """Rows, transfer sets and surrogates go by the victim's name: equal names must be told apart, or refused."""
    Path("elsewhere").mkdir()
    for file in ("two.py", "elsewhere/two.py"):
        Path(file).write_text(FUNCTIONS)
    shutil.copy(tiny, "elsewhere/tiny.safetensors")
    with contextlib.suppress(UserError):  # a refusal would do as well
        rows = experiment.run(make_case(victims=names, budgets=(8,)))
        assert len(rows) == len(report.group_over_seeds(rows)) == 4
        assert len(list(FOLDER.glob("*.safetensors"))) == 2


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knockoff", "--budget", "0"], "budgets.0: "),
        (["knockoff", "--budget", "1"], "budgets.0: "),
        (["knockoff", "--budget", "8", "--budget", "8"], "budgets contains duplicates"),
        (["knockoff", "--victim", "nobody"], "victim 'nobody': artifacts/baseline/nobody.safetensors does not exist"),
        (["knockoff", "--victim", "expert/nobody"], "artifacts/pretrain/nobody.safetensors does not exist"),
        (["knockoff", "--surrogate", "nobody"], "surrogate 'nobody' is not known; there are same, other"),
        (["knockoff", "--answers", "aloud"], "answers.0: "),
        (["knockoff", "--answers", "rounded-0"], "answers.0: "),
        (["knockoff", "--weights", "weights.pt"], "--weights: mixture has weights already; --weights is for --victim "),
        (["knockoff", "--victim", "nobody", "--weights", "weights.pt"], "--weights is for --victim path/to/file.py"),
        (["nothing", "--budget", "8"], "extract.attacks has no 'nothing'; there are knockoff, jbda"),
        (["nothing"], "extract.attacks has no 'nothing'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_sentence_and_leaves_nothing_behind(
    pipeline: Path, advmoe: Advmoe, arguments: list[str], words: str
) -> None:
    before = tree(pipeline)
    assert words in sentence(advmoe("extract", *arguments))
    assert tree(pipeline) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knockoff", "--budget", "31"], "a budget of 31 queries cannot be used up: the pool has 30 images"),
        (["jbda", "--budget", "21"], "a budget of 21 queries cannot be used up: 5 seeds doubled 2 times are 20"),
    ],
    ids=["knockoff", "jbda"],
)
def test_a_budget_beyond_the_pool_is_one_sentence_and_no_result(
    pipeline: Path, advmoe: Advmoe, arguments: list[str], words: str
) -> None:
    assert words in sentence(advmoe("extract", *arguments))
    assert list(pipeline.glob("runs/*/*.json")) == []
    assert list(pipeline.glob("runs/*/models/mixture-*")) == []


def test_a_budget_beyond_the_pool_is_refused_before_anything_is_trained(pipeline: Path, advmoe: Advmoe) -> None:
    """The control may take an hour, and would be left behind."""
    before = tree(pipeline)
    assert "cannot be used up" in sentence(advmoe("extract", "knockoff", "--budget", "31"))
    assert tree(pipeline) == before


def test_a_second_victim_that_is_not_there_is_refused_before_the_first_is_asked(pipeline: Path, advmoe: Advmoe) -> None:
    before = tree(pipeline)
    ran = advmoe("extract", "knockoff", "--victim", "mixture", "--victim", "nobody")
    assert "victim 'nobody'" in sentence(ran)
    assert tree(pipeline) == before


def test_a_quick_question_leaves_the_record_alone(pipeline: Path, advmoe: Advmoe) -> None:
    ran = advmoe("extract", "knockoff", "--budget", "6", "--answers", "rounded-1", "--surrogate", "other")
    assert ran.code == 0, ran.err
    assert not FOLDER.exists()
    assert not Path("metrics/extract").exists()
    (folder,) = (pipeline / "runs").glob("extract-knockoff-*")
    rows, _ = report.read(folder / "runs.json")
    assert [(row.answers, row.surrogate, row.budget) for row in rows] == [
        ("none", "other", 0),
        ("rounded-1", "other", 6),
    ]
    assert (folder / "models/mixture-rounded-1-seed-0/other-6.safetensors").is_file()
    assert (folder / "curve.csv").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extract.attacks.knockoff.surrogates": ["nobody"]}, "attacks.knockoff.surrogates lists 'nobody'"),
        ({"extract.attacks.knockoff.attack.pool.kind": "web"}, "extract.attacks.knockoff.attack"),
        ({"extract.attacks.knockoff.budgets": []}, "extract.attacks.knockoff.budgets"),
        ({"extract.detector.delta": 1.5}, "extract.detector.delta"),
        ({"extract.robust.epsilon": 0.1}, "extract.robust.epsilon: is not a known key"),
        ({"extract.attacks": {}}, "extract.attacks"),
        ({"extract.steps": 0}, "extract.steps: "),
        ({"extract.steps": 2.5}, "extract.steps: "),
        ({"extract": {key: value for key, value in SECTION.items() if key != "steps"}}, "extract.steps: "),
        ({"extract.attacks.jbda.attack.seeds": 1}, "extract.attacks.jbda.attack"),
    ],
    ids=[
        "surrogate",
        "pool",
        "budgets",
        "delta",
        "epsilon",
        "attacks",
        "no-steps",
        "half-a-step",
        "steps-missing",
        "one-seed",
    ],
)
def test_mistakes_in_params_are_named(
    pipeline: Path, edit: Edit, advmoe: Advmoe, changes: dict[str, Any], words: str
) -> None:
    edit(changes)
    before = tree(pipeline)
    assert words in sentence(advmoe("extract", "knockoff"))
    assert tree(pipeline) == before


BY_SHARES: dict[str, dict[str, Any]] = {
    "best": {"kind": "best", "rounds": 2, "epsilon": 0.1, "steps": 1, "step_size": 1.0},
    "knockoff-adaptive": {"kind": "knockoff-adaptive", "pool": {"kind": "noise", "images": 30}, "rounds": 2},
}


@pytest.mark.parametrize("kind", BY_SHARES)
def test_several_budgets_of_an_attack_that_plans_for_one_are_refused_in_one_sentence(
    pipeline: Path, edit: Edit, advmoe: Advmoe, kind: str
) -> None:
    """The first eight of twenty queries are not what a budget of eight would have bought."""
    edit({"extract.attacks.knockoff": KNOCKOFF | {"attack": BY_SHARES[kind]}})
    before = tree(pipeline)
    words = f"budgets: {kind} depends on the whole budget"
    said = sentence(advmoe("extract", "knockoff"))
    assert words in said
    assert "extract.attacks.knockoff: " in said
    edit({"extract.attacks.knockoff.budgets": [20]})
    said = sentence(advmoe("extract", "knockoff", "--budget", "8", "--budget", "20"))
    assert words in said
    assert tree(pipeline).keys() == before.keys()


@pytest.mark.parametrize("kind", BY_SHARES)
def test_one_budget_of_an_attack_that_plans_for_it_is_a_study(pipeline: Path, kind: str) -> None:
    del pipeline
    rows = experiment.run(make_case(attack=BY_SHARES[kind], budgets=(8,)))
    assert [row.query_stats.get("queries_used", 0) for row in rows] == [0, 8]
    with pytest.raises(UserError, match="a budget of 3 queries is less than two in each of 2 rounds"):
        experiment.run(make_case(attack=BY_SHARES[kind], budgets=(3,)))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("nn.Linear(49, 10)", "cannot take images of shape (1, 8, 8)"),
        ("nn.Linear(64, 9)", "outputs 9 classes, but labels go up to 9"),
        ("nn.Linear(64, 11)", "has 11 classes, but the data has 10"),
    ],
    ids=["shape", "too few classes", "too many classes"],
)
def test_an_external_network_that_does_not_fit_is_refused_before_the_first_query(
    pipeline: Path, code: str, words: str
) -> None:
    Path("mine.py").write_text(
        f"from torch import nn\n\n\ndef factory():\n    return nn.Sequential(nn.Flatten(), {code})\n"
    )
    before = tree(pipeline)
    with pytest.raises(UserError) as refused:
        experiment.run(make_case(victims=("mixture", "mine.py:factory")))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {name for name in tree(pipeline) if "__pycache__" not in name} == before.keys()

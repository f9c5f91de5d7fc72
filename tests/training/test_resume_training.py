"""Training that is killed and goes on: the same to the last bit, and nothing stale is ever taken over."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import EXTRACT, LEARNING, Advmoe, Edit
from tiny import FACTS
from torch import Tensor, nn

from advmoe.core import artifacts, paths
from advmoe.core.errors import UserError
from advmoe.data.batches import Augmentation
from advmoe.data.dataset import Dataset, Split, SplitName
from advmoe.evaluation.external_models import read_weights
from advmoe.models import classifiers
from advmoe.models.classifiers import (
    BackboneSettings,
    ConfidenceSettings,
    GateSettings,
    PlainArchitecture,
    UniformGateSettings,
)
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import manager, storage, workdir
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import generator
from advmoe.threats import victim_training
from advmoe.threats.extraction import experiment as extraction
from advmoe.training.baselines.tasks import AlternatingTask, LastLayersTask, SynergyTask
from advmoe.training.batch_attacks import CleanBatches, FgsmBatches, MixedBatches, PgdBatches, TradesBatches
from advmoe.training.config import Schedule, Validation
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.joint import JointConfig, JointRun, MixtureDesign, MixtureTask, paper_design, train_mixture
from advmoe.training.single import PlainTask, SingleConfig, TradesTask
from advmoe.training.trainer import Trainer, fit

BACKBONE = BackboneSettings(kind="cnn", width=2)
EPOCHS, STEPS = 2, 3  # in each epoch
MIXED = MixedBatches(
    kind="mixed",
    weights=(1, 1, 1),
    of=(
        CleanBatches(kind="clean"),
        FgsmBatches(kind="fgsm", epsilons=(0.01, 0.02)),
        PgdBatches(kind="pgd", steps=(1, 2), step_size=0.5),
    ),
)
TRADES = TradesBatches(kind="trades", steps=(1, 2), step_size=0.5, beta=2.0)
RECIPE: dict[str, Any] = tiny.RECIPE | {  # with all that has a state of its own
    "epochs": EPOCHS,
    "clip": 1.0,
    "ema": 0.5,
    "augmentation": Augmentation(crop=1, flip=True),
    "selection": "best",
    "validation": Validation(steps=2, step_size=0.5, gap=0.2, images=9),
}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of unfinished work, written to after every step."""
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "0")
    monkeypatch.setattr(manager, "MAX_TIME_SHARE", float("inf"))
    machine.machine.cache_clear()
    storage.warn_once.cache_clear()
    datasets = (victim_training._clean_dataset, extraction._dataset)
    for remembered in datasets:
        remembered.cache_clear()
    yield tmp_path / "state"
    for remembered in datasets:
        remembered.cache_clear()


def make_split(count: int, name: str) -> Split:
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator("test_resume", name)).to(torch.uint8)
    return Split(images, torch.arange(count) % 3, torch.arange(count))


def make_data() -> Dataset:
    return Dataset(
        {"train": make_split(8 * STEPS, "train"), "validation": make_split(9, "validation")}, FACTS, "0" * 64
    )


def make_model(*seed: object) -> nn.Module:
    return classifiers.build(PlainArchitecture(kind="plain", backbone=BACKBONE), FACTS, *seed)


def plain(
    checkpoint_dir: Path | None, *, model: nn.Module | None = None, beta: float | None = None, **changes: Any
) -> TrainingResult:
    recipe = SingleConfig(validation_epsilon=0.05, **RECIPE)
    job = TrainingJob(
        "tiny", 0, make_data(), recipe, TRADES if beta else MIXED, 0.05, "clean", checkpoint_dir=checkpoint_dir
    )
    job = replace(job, **changes)
    model = model or make_model(0)
    return fit(TradesTask(model, recipe, beta) if beta else PlainTask(model, recipe), job)


def trades(checkpoint_dir: Path | None) -> TrainingResult:
    return plain(checkpoint_dir, beta=2.0)


def mixture(
    checkpoint_dir: Path | None, design: MixtureDesign | None = None, temperature: float = 1.0
) -> TrainingResult:
    recipe = JointConfig(
        **RECIPE | tiny.JOINT | {"gate": GateSettings(width=2, temperature=temperature), "adversary": MIXED},
    )
    experts = [make_model(1), make_model(2)]
    design = design or paper_design(recipe)
    trained, _ = train_mixture(
        JointRun(experts, BACKBONE, make_data(), recipe, 0, 0.05, design=design, checkpoint_dir=checkpoint_dir)
    )
    return trained


def uniform(checkpoint_dir: Path | None) -> TrainingResult:
    return mixture(checkpoint_dir, MixtureDesign(UniformGateSettings(kind="uniform"), "probabilities", MixtureTask))


def last_layers(checkpoint_dir: Path | None) -> TrainingResult:
    return mixture(
        checkpoint_dir, MixtureDesign(GateSettings(width=2, temperature=1.0), "probabilities", LastLayersTask)
    )


def alternating(checkpoint_dir: Path | None) -> TrainingResult:
    return mixture(checkpoint_dir, MixtureDesign(GateSettings(width=2, temperature=1.0), "top1", AlternatingTask))


def synergy(checkpoint_dir: Path | None, temperature: float = 1.0) -> TrainingResult:
    return mixture(
        checkpoint_dir,
        MixtureDesign(ConfidenceSettings(kind="confidence", temperature=temperature), "top1", SynergyTask),
    )


Train = Callable[[Path | None], TrainingResult]
LEARNERS: list[Train] = [plain, trades, mixture, uniform, last_layers, alternating, synergy]


def assert_same(found: TrainingResult, expected: TrainingResult) -> None:
    tensors = expected.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.model.state_dict().items())
    assert (found.history, found.kept, found.alarms, found.cost) == (
        expected.history,
        expected.kept,
        expected.alarms,
        expected.cost,
    )


class Killed(BaseException):
    """Not to be caught."""


@pytest.fixture
def kill_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """`kill_before(3)`: the run dies in its third step from here; None: it does not. Returns the steps taken."""
    original = Trainer.step

    def plant(limit: int | None) -> list[int]:
        taken: list[int] = []

        def step(self: Trainer, images: Tensor, labels: Tensor) -> Tensor:
            taken.append(len(labels))
            loss = original(self, images, labels)
            if len(taken) == limit:
                raise Killed
            return loss

        monkeypatch.setattr(Trainer, "step", step)
        return taken

    return plant


Plant = Callable[[int | None], list[int]]


@pytest.mark.parametrize("train", LEARNERS)
def test_killed_in_every_step_it_ends_the_same(train: Train, root: Path, kill_before: Plant) -> None:
    expected = train(None)
    for _ in range(EPOCHS * STEPS - 1):
        kill_before(2)  # one step is kept, the second is lost
        with pytest.raises(Killed):
            train(root)
    taken = kill_before(None)
    assert_same(train(root), expected)
    assert len(taken) == 1
    assert_same(train(root), expected)  # what is finished is not trained again
    assert len(taken) == 1


def test_killed_while_validating_it_ends_the_same(root: Path, kill_before: Plant) -> None:
    expected = mixture(None)

    def die(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advmoe.training.validation.validate", die)
        with pytest.raises(Killed):
            mixture(root)
    taken = kill_before(None)
    assert_same(mixture(root), expected)
    assert len(taken) == (EPOCHS - 1) * STEPS


def test_nothing_is_written_before_it_is_time(root: Path, monkeypatch: pytest.MonkeyPatch, kill_before: Plant) -> None:
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "1000")
    machine.machine.cache_clear()
    kill_before(EPOCHS * STEPS)
    with pytest.raises(Killed):
        plain(root)
    assert not root.exists()


def test_saving_takes_a_share_of_the_time_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "MAX_TIME_SHARE", 1e-9)
    saved: list[Path] = []
    original = storage.save_checkpoint

    def keep(file: Path, snapshot: Checkpoint) -> bool:
        saved.append(file)
        return original(file, snapshot)

    monkeypatch.setattr(storage, "save_checkpoint", keep)
    plain(root)
    assert len(saved) == 2  # after the first step, which is to find out what it takes, and at the end


def flipped(split: SplitName, part: str) -> Dataset:
    data = make_data()
    changed = replace(data[split], **{part: getattr(data[split], part).flip(0)})
    return replace(data, splits={**data.splits, split: changed})


CHANGES: dict[str, Callable[[Path], object]] = {
    "seed": lambda root: plain(root, seed=1),
    "epsilon": lambda root: plain(root, epsilon=0.06),
    "name": lambda root: plain(root, name="other"),
    "selection": lambda root: plain(root, select_by="pgd"),
    "cost": lambda root: plain(root, prior_flops=1),
    "adversary": lambda root: plain(root, adversary=CleanBatches(kind="clean")),
    "recipe": lambda root: plain(root, config=SingleConfig(validation_epsilon=0.05, **RECIPE | {"clip": 2.0})),
    "weights": lambda root: plain(root, model=make_model(1)),
    "task": lambda root: plain(root, beta=2.0, adversary=MIXED),
    "images": lambda root: plain(root, dataset=flipped("train", "images")),
    "labels": lambda root: plain(root, dataset=flipped("train", "labels")),
    "validation": lambda root: plain(root, dataset=flipped("validation", "labels")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_starts_anew(change: str, root: Path, kill_before: Plant) -> None:
    plain(root)
    assert len(list(root.glob("*.safetensors"))) == 1
    taken = kill_before(None)
    CHANGES[change](root)
    assert len(taken) == EPOCHS * STEPS
    assert len(list(root.glob("*.safetensors"))) == 2


def test_what_no_tensor_shows_counts_too(root: Path) -> None:
    synergy(root, 1.0)
    synergy(root, 2.0)
    mixture(root, temperature=1.0)
    mixture(root, temperature=2.0)
    assert len(list(root.glob("*.safetensors"))) == 4


def test_another_version_and_other_threads_start_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(root)
    torch.set_num_threads(2)
    plain(root)
    torch.set_num_threads(1)
    monkeypatch.setattr(workdir, "code_fingerprint", lambda: "another version")
    plain(root)
    assert len(list(root.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "something else"])
def test_a_damaged_state_is_named_once_and_never_used(
    damage: str, root: Path, kill_before: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = plain(None)
    kill_before(4)
    with pytest.raises(Killed):
        plain(root)
    (file,) = root.glob("*.safetensors")
    whole = file.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 4
    contents = {"flipped": bytes(middle), "truncated": whole[:-3], "empty": b"", "something else": b"{}" * 100}
    file.write_bytes(contents[damage])
    taken = kill_before(None)
    capsys.readouterr()
    assert_same(plain(root), expected)
    assert len(taken) == EPOCHS * STEPS
    warning = f"warning: {file} is damaged and ignored; tiny starts from the beginning\n"
    assert capsys.readouterr().err == warning


def test_a_disk_that_takes_nothing_costs_one_warning(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root.write_text("a file where a folder should be")
    assert_same(plain(root), plain(None))
    assert capsys.readouterr().err.count("warning: ") == 1


def diverge_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The weights get out of hand in this step, counted from 1; the loss shows it in the next."""
    original = Trainer.step
    taken: list[None] = []

    def stumble(self: Trainer, images: Tensor, labels: Tensor) -> Tensor:
        taken.append(None)
        loss = original(self, images, labels)
        if len(taken) == step:
            next(self.task.model.parameters()).data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(Trainer, "step", stumble)


def test_a_run_that_diverges_names_the_batch_and_keeps_the_last_good_weights(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as one_epoch:
        one_epoch.setitem(RECIPE, "epochs", 1)
        one_epoch.setitem(RECIPE, "schedule", Schedule(warmup=0.0, decay="constant"))
        good = plain(None).model.state_dict()
    monkeypatch.setitem(RECIPE, "schedule", Schedule(warmup=0.0, decay="constant"))
    diverge_in(monkeypatch, STEPS + 1)
    with pytest.raises(UserError) as error:
        plain(root)
    assert str(error.value).startswith("tiny: the weights became NaN or infinite in epoch 2, batch 1; lower optimizer")
    (kept,) = root.glob("*-epoch-1.safetensors")
    assert str(error.value).endswith(f"; the last good weights, of epoch 1, are in {kept}")
    weights = read_weights(kept)
    assert weights.keys() == good.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in good.items())


def test_a_state_that_diverged_is_never_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge_in(monkeypatch, STEPS + 2)
    with pytest.raises(UserError, match="in epoch 2, batch 2"):
        plain(root)
    (file,) = (file for file in root.glob("*.safetensors") if "-epoch-" not in file.name)
    found = storage.load_checkpoint(file)
    assert found is not None
    assert len(found.tensors["epoch/losses"]) == 1  # of the step before
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())


def test_who_diverges_in_the_first_epoch_or_keeps_nothing_hears_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as early:
        diverge_in(early, 1)
        with pytest.raises(UserError, match=r"; no epoch was finished before$"):
            plain(root)
    diverge_in(monkeypatch, STEPS + 1)
    with pytest.raises(UserError, match=r"in epoch 2, batch 2; .*; the last good weights, of epoch 1, are not kept$"):
        plain(None)


def test_what_a_full_disk_did_not_take_is_not_trained_again(
    advmoe: Advmoe, project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit({"pretrain.epochs": 1})
    sync, artifact = os.fsync, project / paths.artifact("pretrain", "clean")

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(artifact.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        ran = advmoe("pretrain", "clean")
    assert ran.code == 2
    where = paths.artifact("pretrain", "clean")
    assert ran.err == f"error: {where}: could not be written (No space left on device); nothing was changed\n"
    assert not list(artifact.parent.glob("*clean*"))
    ran = advmoe("pretrain", "clean")
    assert ran.code == 0
    assert "clean: resumed from a checkpoint, after 1 epochs and 0 steps" in ran.out
    assert artifact.exists()


def test_seconds_before_a_kill_count(root: Path, kill_before: Plant) -> None:
    kill_before(3)
    with pytest.raises(Killed):
        plain(root)
    (file,) = root.glob("*.safetensors")
    found = storage.load_checkpoint(file)
    assert found is not None
    storage.save_checkpoint(file, replace(found, values={**found.values, "seconds": 1000.0}))
    assert plain(root).seconds > 1000


# ---- killed in earnest


def die_in_step(root: Path, limit: int) -> None:
    """In a process of its own: train, and end by SIGKILL in the middle of a step."""
    torch.set_num_threads(1)
    os.environ.update(ADVMOE_STATE_DIR=str(root), ADVMOE_STATE_SECONDS="0")
    manager.MAX_TIME_SHARE = float("inf")
    taken = []

    def on_after_backward(self: MixtureTask) -> None:
        taken.append(self)
        if len(taken) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    original = MixtureTask.on_after_backward
    MixtureTask.on_after_backward = on_after_backward  # type: ignore[method-assign]
    alternating(root)


def test_three_kills_change_nothing(root: Path, kill_before: Plant) -> None:
    context = multiprocessing.get_context("forkserver")  # which imports once for all three
    context.set_forkserver_preload(["advmoe.threats.extraction.experiment", "pytest"])
    for limit in (2, 3, 2):
        child = context.Process(target=die_in_step, args=(root, limit))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    taken = kill_before(None)
    assert_same(alternating(root), alternating(None))
    assert len(taken) == EPOCHS * STEPS - 4 + EPOCHS * STEPS


# ---- told to end


@pytest.fixture
def python_hears_signals() -> Iterator[None]:
    """As in the foreground: who starts the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_hears_signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stage_that_is_told_to_end_saves_at_once_and_says_how_to_go_on(
    number: signal.Signals, code: int, advmoe: Advmoe, project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "1000")
    edit({"pretrain.epochs": 2})
    file = project / paths.artifact("pretrain", "clean")
    assert advmoe("pretrain", "clean").code == 0
    expected = file.read_bytes()
    file.unlink()
    steps: list[None] = []
    original = Trainer.step

    def step(self: Trainer, images: Tensor, labels: Tensor) -> Tensor:
        steps.append(None)
        if len(steps) == 5:
            signal.raise_signal(number)
        return original(self, images, labels)

    monkeypatch.setattr(Trainer, "step", step)
    ran = advmoe("pretrain", "clean")
    assert ran.code == code
    assert "clean: checkpoint saved; run the same command again to resume" in ran.out
    assert ran.err == "interrupted; run the same command again to resume\n"
    assert not file.exists()
    ran = advmoe("pretrain", "clean")
    assert ran.code == 0
    assert "clean: resumed from a checkpoint, after 0 epochs and 5 steps" in ran.out
    assert file.read_bytes() == expected
    assert list(machine.machine().state_dir.iterdir()) == []


def test_clean_says_what_it_removed(advmoe: Advmoe, kill_before: Plant) -> None:
    kill_before(3)

    def work() -> None:
        with workdir.open_workdir("train") as checkpoint_dir:
            plain(checkpoint_dir)

    with pytest.raises(Killed):
        work()
    said = advmoe("clean").out
    assert said.startswith("0 folders of unfinished work deleted, 0.0 MB\n1 can be resumed;")
    assert advmoe("clean", "--all").out.startswith("1 folders of unfinished work deleted, 0.")
    assert list(machine.machine().state_dir.iterdir()) == []


# ---- studies


def files_of(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".run.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def tracked() -> dict[str, bytes]:
    return {
        f"{name}/{file}": content for name in ("artifacts", "metrics") for file, content in files_of(Path(name)).items()
    }


KNOCKOFF = {
    "attack": {"kind": "knockoff", "pool": {"kind": "in-distribution"}},
    "victims": ["mixture"],
    "answers": ["soft"],
    "budgets": [50, 100],
    "surrogates": ["same"],
    "seeds": [0, 1],
}
EXTRACTION = EXTRACT | {"images": 24, "recipe": LEARNING | {"batch_size": 100}, "attacks": {"knockoff": KNOCKOFF}}
STUDIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "poison": ({"poison.attacks.badnets.victims": ["standard"]}, ["poison", "badnets"]),
    "extract": ({"extract": EXTRACTION}, ["extract", "knockoff"]),
}


@pytest.mark.parametrize("study", STUDIES)
def test_networks_of_a_killed_study_are_not_trained_again(
    study: str, advmoe: Advmoe, project: Path, edit: Edit, kill_before: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    del project
    monkeypatch.setattr(artifacts, "_git", lambda *_: None)  # asked twice for every file, and this is no repository
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "1000")  # too long for anything but what is finished
    machine.machine.cache_clear()
    changes, command = STUDIES[study]
    edit(changes)
    whole = kill_before(None)
    assert advmoe(*command).code == 0
    expected = tracked()
    assert list(machine.machine().state_dir.iterdir()) == []  # on record: forgotten
    kill_before(len(whole) - 1)
    with pytest.raises(Killed):
        advmoe(*command)
    after = kill_before(None)
    assert advmoe(*command).code == 0
    # the twin is done and the victim was killed; of six surrogates the last two, of one step each, were left
    assert len(after) == {"poison": len(whole) // 2, "extract": 2}[study]
    assert tracked() == expected
    assert list(machine.machine().state_dir.iterdir()) == []

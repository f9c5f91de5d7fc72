"""Unfinished work on disk: where it lies, that damage is noticed, who may touch it, and what is cleaned away."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from filelock import FileLock

from advmoe.attacks.ball import LInf
from advmoe.attacks.random_streams import BatchDraws
from advmoe.core.errors import UserError
from advmoe.evaluation.batch_store import BatchStore, FinishedBatch
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.checkpoints.workdir import CleanResult, WorkDir
from advmoe.runtime.signals import Interrupted, defer_signals, handle_signals

OTHER = "0" * workdir.VERSION_LENGTH  # a version that is not this one
SNAPSHOT = Checkpoint(
    {"a": torch.arange(5.0), "b": torch.tensor(3)}, {"loss": 0.1, "nan": float("nan"), "rows": [1, 2]}
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of unfinished work."""
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(tmp_path / "state"))
    machine.machine.cache_clear()
    storage.warn_once.cache_clear()
    return tmp_path / "state"


def leave_something(label: str = "train", folder: Path | None = None) -> WorkDir:
    """A piece of work that was killed."""
    place = WorkDir(folder) if folder else WorkDir.of(label)
    assert storage.save_checkpoint(place.folder / "a.safetensors", SNAPSHOT)
    return place


def killed() -> None:
    """Work that ends too early."""
    with workdir.open_workdir("train") as shelf:
        assert shelf is not None
        storage.save_checkpoint(shelf / "a.safetensors", SNAPSHOT)
        raise KeyboardInterrupt


def elsewhere(place: WorkDir) -> FileLock:
    """The lock as another process holds it."""
    lock = FileLock(place.folder.with_name(place.folder.name + workdir.LOCK))
    place.folder.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire(timeout=0)
    return lock


# ---- a file


def test_a_snapshot_comes_back_as_it_was(root: Path) -> None:
    assert storage.save_checkpoint(root / "a.safetensors", SNAPSHOT)
    found = storage.load_checkpoint(root / "a.safetensors")
    assert found is not None
    assert found.tensors.keys() == SNAPSHOT.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in SNAPSHOT.tensors.items())
    assert repr(found.values) == repr(SNAPSHOT.values)  # as text, because NaN is no equal of itself
    assert storage.load_checkpoint(root / "b.safetensors") is None


def test_every_flipped_bit_and_every_truncation_is_noticed(root: Path) -> None:
    file = root / "a.safetensors"
    storage.save_checkpoint(file, SNAPSHOT)
    whole = file.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            found = storage.load_checkpoint(file)
        except UserError as error:
            assert str(error) == f"{file} is damaged"  # noqa: PT017  (a bit of an unused name may be flipped)
        else:
            assert found is not None
            assert found.values["rows"] == [1, 2]
            assert torch.equal(found.tensors["a"], SNAPSHOT.tensors["a"])
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            storage.load_checkpoint(file)


def test_a_full_disk_is_one_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not storage.save_checkpoint(root / "a.safetensors", SNAPSHOT)
    assert not storage.save_checkpoint(root / "b.safetensors", SNAPSHOT)
    warning = f"warning: {root}: No space left on device; work goes on, but nothing is kept for the case of a kill\n"
    assert capsys.readouterr().err == warning
    assert list(root.iterdir()) == []


# ---- a folder


def test_a_folder_is_named_after_the_work_the_version_and_all_that_determines_it() -> None:
    folder = WorkDir.of("baseline/a", 1, "x").folder
    assert folder.name.startswith(f"baseline-a-{workdir.code_digest()[: workdir.VERSION_LENGTH]}-")
    others = [WorkDir.of("baseline/b", 1, "x"), WorkDir.of("baseline/a", 1, "y"), WorkDir.of("baseline/a", 2, "x")]
    assert len({folder, *(other.folder for other in others)}) == 4
    assert WorkDir.of("baseline/a", 1, "x").folder == folder


def test_another_version_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WorkDir.of("train").folder
    monkeypatch.setattr(workdir, "code_digest", lambda: "f" * 64)
    assert WorkDir.of("train").folder != folder


def test_work_that_was_done_leaves_nothing_and_work_that_was_killed_its_files(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert [path.name for path in root.rglob("*.safetensors")] == ["a.safetensors"]
    assert not list(root.glob("*.lock"))
    with workdir.open_workdir("train") as shelf:
        assert shelf is not None
        assert (shelf / "a.safetensors").exists()
    assert list(root.iterdir()) == []


def test_the_second_at_the_same_work_keeps_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    place = leave_something()
    lock = elsewhere(place)
    with workdir.open_workdir("train") as shelf:
        assert shelf is None
    assert "another process is at the same work" in capsys.readouterr().err
    assert place.folder.exists()
    lock.release()
    with workdir.open_workdir("train") as shelf:
        assert shelf == place.folder


def test_a_folder_that_cannot_be_made_is_one_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root.write_text("a file")
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(root / "inside"))
    machine.machine.cache_clear()
    for _ in range(2):
        with workdir.open_workdir("train") as shelf:
            assert shelf is None
    assert capsys.readouterr().err.count("warning: ") == 1


# ---- evaluations keep theirs in the same way


IMAGES = torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0))
BALL = LInf(0.1)


def part() -> FinishedBatch:
    rows = torch.tensor([4, 5])
    images = BALL.start(IMAGES[rows], BatchDraws(machine.generator("part")))
    return FinishedBatch(rows, images, torch.tensor([True, False]), 7, 8, 0.25)


def test_a_batch_of_an_evaluation_comes_back_as_it_was(root: Path) -> None:
    store = BatchStore({"attack": "pgd"})
    store.add(part())
    (found,) = BatchStore({"attack": "pgd"}).parts(IMAGES, BALL)
    assert torch.equal(found.rows, part().rows)
    assert torch.equal(found.images, part().images)
    assert torch.equal(found.overshoot, part().overshoot)
    assert (found.forward, found.backward, found.seconds) == (7, 8, 0.25)
    assert BatchStore({"attack": "fgsm"}).parts(IMAGES, BALL) == []
    store.clear()
    assert list(root.iterdir()) == []


def test_the_second_at_the_same_evaluation_keeps_nothing() -> None:
    store = BatchStore({"attack": "pgd"})
    lock = elsewhere(store.place)
    store.add(part())
    assert store.parts(IMAGES, BALL) == []
    lock.release()
    store.add(part())
    assert store.parts(IMAGES, BALL) == []  # once is enough to know
    BatchStore({"attack": "pgd"}).add(part())
    assert len(store.parts(IMAGES, BALL)) == 1
    store.clear()


# ---- what is left over


def test_clean_removes_what_other_versions_left_and_never_what_is_in_use(root: Path) -> None:
    mine, used = leave_something(), leave_something("baseline-a")
    old = leave_something(folder=root / f"train-{OTHER}-0123456789abcdef")
    busy = leave_something(folder=root / f"pretrain-x-{OTHER}-0123456789abcdef")
    size = old.size()
    locks = [elsewhere(used), elsewhere(busy)]
    elsewhere(WorkDir(root / f"gone-{OTHER}-0123456789abcdef")).release()  # only the lock was left
    assert size > 0
    assert workdir.clean(everything=False) == CleanResult(removed=1, freed=size, resumable=2, in_use=1)
    assert [place.folder.exists() for place in (mine, used, old, busy)] == [True, True, False, True]
    assert workdir.clean(everything=True) == CleanResult(removed=1, freed=mine.size() or size, resumable=0, in_use=2)
    assert [place.folder.exists() for place in (mine, used, busy)] == [False, True, True]
    for lock in locks:
        lock.release()
    assert workdir.clean(everything=True).removed == 2
    assert list(root.iterdir()) == []
    assert workdir.clean(everything=True) == CleanResult(0, 0, 0, 0)


def test_clean_leaves_alone_what_is_not_ours(root: Path) -> None:
    (root / "photographs-2024-summer").mkdir(parents=True)
    (root / "letter-00000000-0123456789abcdef.txt").write_text("dear")
    assert workdir.clean(everything=True) == CleanResult(0, 0, 0, 0)
    assert len(list(root.iterdir())) == 2


# ---- signals


@pytest.fixture(autouse=True)
def python_hears_signals() -> Iterator[None]:
    """As in the foreground: who starts the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_work_a_signal_is_heard_at_once(number: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted) as ended, handle_signals():
        signal.raise_signal(number)
    assert ended.value.exit_code == code


@pytest.mark.parametrize(("number", "borne"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_work_holds_signals_back_but_not_a_second_ctrl_c(number: signal.Signals, borne: int) -> None:
    reached: list[int | None] = []

    def work() -> None:
        with handle_signals(), defer_signals() as held:
            for _ in range(3):
                signal.raise_signal(number)
                reached.append(held.pending)

    with pytest.raises(Interrupted) as ended:
        work()
    assert ended.value.number == number
    assert reached == [number] * borne


def test_a_signal_that_came_is_heard_when_the_work_is_done() -> None:
    reached = []

    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

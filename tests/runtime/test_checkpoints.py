"""Checkpoints on disk: file format, damage, folders and locks, cleaning, and deferred signals."""

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
from advmoe.attacks.random_streams import BatchStream
from advmoe.core.errors import UserError
from advmoe.evaluation.batch_store import BatchStore, FinishedBatch
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.checkpoints.workdir import CleanResult, WorkDir
from advmoe.runtime.code_fingerprint import code_fingerprint
from advmoe.runtime.signals import Interrupted, defer_signals, handle_signals

OTHER = "0" * workdir.VERSION_LENGTH  # another version of the code
CHECKPOINT = Checkpoint(
    {"a": torch.arange(5.0), "b": torch.tensor(3)}, {"loss": 0.1, "nan": float("nan"), "rows": [1, 2]}
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all checkpoints."""
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(tmp_path / "state"))
    machine.machine.cache_clear()
    storage.warn_once.cache_clear()
    return tmp_path / "state"


def leave_checkpoint(label: str = "train", folder: Path | None = None) -> WorkDir:
    """A folder with the checkpoint of a killed run."""
    work = WorkDir(folder) if folder else WorkDir.of(label)
    assert storage.save_checkpoint(work.folder / "a.safetensors", CHECKPOINT)
    return work


def interrupted_work() -> None:
    """Saves a checkpoint and is interrupted."""
    with workdir.open_workdir("train") as checkpoint_dir:
        assert checkpoint_dir is not None
        storage.save_checkpoint(checkpoint_dir / "a.safetensors", CHECKPOINT)
        raise KeyboardInterrupt


def lock_elsewhere(work: WorkDir) -> FileLock:
    """Locks the folder as another process would."""
    lock = FileLock(work.folder.with_name(work.folder.name + workdir.LOCK_SUFFIX))
    work.folder.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire(timeout=0)
    return lock


# ---- a file


def test_a_checkpoint_is_loaded_as_saved(root: Path) -> None:
    assert storage.save_checkpoint(root / "a.safetensors", CHECKPOINT)
    found = storage.load_checkpoint(root / "a.safetensors")
    assert found is not None
    assert found.tensors.keys() == CHECKPOINT.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in CHECKPOINT.tensors.items())
    assert repr(found.values) == repr(CHECKPOINT.values)  # as text, because NaN != NaN
    assert storage.load_checkpoint(root / "b.safetensors") is None


def test_every_flipped_bit_and_every_truncation_is_noticed(root: Path) -> None:
    file = root / "a.safetensors"
    storage.save_checkpoint(file, CHECKPOINT)
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
            assert torch.equal(found.tensors["a"], CHECKPOINT.tensors["a"])
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
    assert not storage.save_checkpoint(root / "a.safetensors", CHECKPOINT)
    assert not storage.save_checkpoint(root / "b.safetensors", CHECKPOINT)
    warning = f"warning: {root}: No space left on device; work continues without checkpoints\n"
    assert capsys.readouterr().err == warning
    assert list(root.iterdir()) == []


# ---- a folder


def test_a_folder_is_named_after_label_version_and_facts() -> None:
    folder = WorkDir.of("baseline/a", 1, "x").folder
    assert folder.name.startswith(f"baseline-a-{code_fingerprint()[: workdir.VERSION_LENGTH]}-")
    others = [WorkDir.of("baseline/b", 1, "x"), WorkDir.of("baseline/a", 1, "y"), WorkDir.of("baseline/a", 2, "x")]
    assert len({folder, *(other.folder for other in others)}) == 4
    assert WorkDir.of("baseline/a", 1, "x").folder == folder


def test_another_version_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WorkDir.of("train").folder
    monkeypatch.setattr(workdir, "code_fingerprint", lambda: "f" * 64)
    assert WorkDir.of("train").folder != folder


def test_finished_work_removes_its_folder_and_interrupted_work_keeps_it(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_work()
    assert [path.name for path in root.rglob("*.safetensors")] == ["a.safetensors"]
    assert not list(root.glob("*.lock"))
    with workdir.open_workdir("train") as checkpoint_dir:
        assert checkpoint_dir is not None
        assert (checkpoint_dir / "a.safetensors").exists()
    assert list(root.iterdir()) == []


def test_a_second_process_with_the_same_work_saves_no_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    work = leave_checkpoint()
    lock = lock_elsewhere(work)
    with workdir.open_workdir("train") as checkpoint_dir:
        assert checkpoint_dir is None
    assert "another process does the same work" in capsys.readouterr().err
    assert work.folder.exists()
    lock.release()
    with workdir.open_workdir("train") as checkpoint_dir:
        assert checkpoint_dir == work.folder


def test_a_folder_that_cannot_be_made_is_one_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root.write_text("a file")
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(root / "inside"))
    machine.machine.cache_clear()
    for _ in range(2):
        with workdir.open_workdir("train") as checkpoint_dir:
            assert checkpoint_dir is None
    assert capsys.readouterr().err.count("warning: ") == 1


# ---- batches of an evaluation


IMAGES = torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0))
BALL = LInf(0.1)


def finished_batch() -> FinishedBatch:
    rows = torch.tensor([4, 5])
    images = BALL.start(IMAGES[rows], BatchStream(machine.generator("part")))
    return FinishedBatch(rows, images, torch.tensor([True, False]), 7, 8, 0.25)


def test_a_batch_of_an_evaluation_is_loaded_as_saved(root: Path) -> None:
    store = BatchStore({"attack": "pgd"})
    store.add(finished_batch())
    (found,) = BatchStore({"attack": "pgd"}).load(IMAGES, BALL)
    assert torch.equal(found.rows, finished_batch().rows)
    assert torch.equal(found.images, finished_batch().images)
    assert torch.equal(found.overshoot, finished_batch().overshoot)
    assert (found.forward, found.backward, found.seconds) == (7, 8, 0.25)
    assert BatchStore({"attack": "fgsm"}).load(IMAGES, BALL) == []
    store.clear()
    assert list(root.iterdir()) == []


def test_a_second_process_with_the_same_evaluation_saves_no_batches() -> None:
    store = BatchStore({"attack": "pgd"})
    lock = lock_elsewhere(store.work_dir)
    store.add(finished_batch())
    assert store.load(IMAGES, BALL) == []
    lock.release()
    store.add(finished_batch())
    assert store.load(IMAGES, BALL) == []  # the store tries once
    BatchStore({"attack": "pgd"}).add(finished_batch())
    assert len(store.load(IMAGES, BALL)) == 1
    store.clear()


# ---- cleaning


def test_clean_removes_folders_of_other_versions_and_never_locked_ones(root: Path) -> None:
    mine, used = leave_checkpoint(), leave_checkpoint("baseline-a")
    old = leave_checkpoint(folder=root / f"train-{OTHER}-0123456789abcdef")
    busy = leave_checkpoint(folder=root / f"pretrain-x-{OTHER}-0123456789abcdef")
    size = old.size()
    locks = [lock_elsewhere(used), lock_elsewhere(busy)]
    lock_elsewhere(WorkDir(root / f"gone-{OTHER}-0123456789abcdef")).release()  # only the lock file is left
    assert size > 0
    assert workdir.clean(everything=False) == CleanResult(removed=1, freed_bytes=size, resumable=2, in_use=1)
    assert [work.folder.exists() for work in (mine, used, old, busy)] == [True, True, False, True]
    assert workdir.clean(everything=True) == CleanResult(
        removed=1, freed_bytes=mine.size() or size, resumable=0, in_use=2
    )
    assert [work.folder.exists() for work in (mine, used, busy)] == [False, True, True]
    for lock in locks:
        lock.release()
    assert workdir.clean(everything=True).removed == 2
    assert list(root.iterdir()) == []
    assert workdir.clean(everything=True) == CleanResult(0, 0, 0, 0)


def test_clean_ignores_other_files(root: Path) -> None:
    (root / "photographs-2024-summer").mkdir(parents=True)
    (root / "letter-00000000-0123456789abcdef.txt").write_text("dear")
    assert workdir.clean(everything=True) == CleanResult(0, 0, 0, 0)
    assert len(list(root.iterdir())) == 2


# ---- signals


@pytest.fixture(autouse=True)
def default_sigint() -> Iterator[None]:
    """SIGINT as in the foreground: in background processes shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_is_not_deferred_interrupts_at_once(number: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted) as ended, handle_signals():
        signal.raise_signal(number)
    assert ended.value.exit_code == code


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_signals_are_deferred_except_a_second_ctrl_c(number: signal.Signals, count: int) -> None:
    reached: list[int | None] = []

    def work() -> None:
        with handle_signals(), defer_signals() as signals:
            for _ in range(3):
                signal.raise_signal(number)
                reached.append(signals.pending)

    with pytest.raises(Interrupted) as ended:
        work()
    assert ended.value.number == number
    assert reached == [number] * count


def test_a_deferred_signal_takes_effect_at_the_end() -> None:
    reached = []

    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

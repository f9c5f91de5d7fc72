"""Forged checkpoints with valid checksums: restored only if they could be the run's own, else ignored.

Damaged files, whose checksums do not match, are tested in tests/test_fuzz_artifacts.py.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from fuzzing import Draw, fuzz, refusal, spoilt, watched
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from test_checkpoints import BALL, IMAGES, finished_batch
from test_fuzz_artifacts import altered
from test_resume_training import EPOCHS, STEPS, alternating
from torch import Tensor

from advmoe.core.artifacts import hash_tensors
from advmoe.evaluation.batch_store import BatchStore
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import storage
from advmoe.runtime.checkpoints.manager import CheckpointManager
from advmoe.runtime.checkpoints.storage import CHECKSUM_KEY, VALUES_KEY, Checkpoint
from advmoe.training.job import TrainingJob, TrainingTask
from advmoe.training.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def state_dir(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same checkpoint folder for all cases of a test."""
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(root))
    machine.machine.cache_clear()
    storage.warn_once.cache_clear()
    yield
    machine.machine.cache_clear()


@st.composite
def forged(draw: Draw, whole: Checkpoint) -> Checkpoint:
    """A checkpoint with other tensors, other values, or both."""
    tensors, values = dict(whole.tensors), dict(whole.values)
    what = draw(st.sampled_from(("tensors", "values", "both")))
    if what != "values":
        tensors, _ = draw(altered(tensors))
    if what != "tensors":
        values = draw(spoilt(values, json_only=True)).tree
    return Checkpoint(tensors, values)


@pytest.mark.parametrize(
    "values", [b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}", None], ids=range(7)
)
def test_invalid_values_are_refused(root: Path, values: bytes | None) -> None:
    tensors = {} if values is None else {VALUES_KEY: torch.tensor(list(values), dtype=torch.uint8)}
    file = root / "a.safetensors"
    file.write_bytes(to_safetensors(tensors, metadata={CHECKSUM_KEY: hash_tensors(tensors)}))
    assert refusal(lambda: storage.load_checkpoint(file)) == f"{file} is damaged"
    file.unlink()


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 2), torch.full((2,), torch.nan), torch.tensor(3, dtype=torch.uint8), torch.tensor([-1])]
)
def test_values_of_another_type_are_refused(root: Path, values: Tensor) -> None:
    file = root / "a.safetensors"
    file.write_bytes(to_safetensors({VALUES_KEY: values}, metadata={CHECKSUM_KEY: hash_tensors({VALUES_KEY: values})}))
    assert refusal(lambda: storage.load_checkpoint(file)) == f"{file} is damaged"
    file.unlink()


# ---- training


class Killed(BaseException):
    """Not to be caught."""


@dataclass(frozen=True)
class Unfinished:
    """A mixture whose training was killed in its second epoch: its task and job, checkpoint file and checkpoint."""

    task: TrainingTask
    job: TrainingJob
    file: Path
    checkpoint: Checkpoint

    def new_trainer(self) -> Trainer:
        """The same run at its beginning."""
        return Trainer(copy.deepcopy(self.task), self.job)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Unfinished:
    file = tmp_path_factory.mktemp("unfinished") / "a.safetensors"
    made: list[tuple[TrainingTask, TrainingJob]] = []

    def begin(task: TrainingTask, job: TrainingJob) -> NoReturn:
        made.append((copy.deepcopy(task), job))
        run = Trainer(task, job)

        def on_step_end() -> None:
            if run.state.position == (1, 2):
                assert storage.save_checkpoint(file, run.state.checkpoint())
                raise Killed

        while True:
            run.epoch(on_step_end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advmoe.training.joint.fit", begin)
        with pytest.raises(Killed):
            alternating(None)
    checkpoint = storage.load_checkpoint(file)
    assert checkpoint is not None
    return Unfinished(*made[0], file, checkpoint)


def state_text(run: Trainer) -> str:
    """The state of a run, except for its seconds."""
    state = run.state.checkpoint()
    return f"{hash_tensors(state.tensors)} {dict(state.values) | {'seconds': 0}}"


def try_resume(unfinished: Unfinished, checkpoint: Checkpoint) -> Trainer | None:
    """Returns None if the checkpoint was ignored and the run is unchanged, else the resumed run."""
    assert storage.save_checkpoint(unfinished.file, checkpoint)
    run = unfinished.new_trainer()
    before = state_text(run)
    with watched():
        CheckpointManager(run.state, "mixture", unfinished.file).resume()
    if run.state.position == (0, 0):
        assert state_text(run) == before
        return None
    return run


@fuzz(40)
@given(data=st.data())
def test_any_forged_training(unfinished: Unfinished, data: st.DataObject) -> None:
    run = try_resume(unfinished, data.draw(forged(unfinished.checkpoint)))

    def finish() -> None:
        assert run is not None
        while not run.is_finished:
            run.epoch(lambda: None)
        assert [row["epoch"] for row in run.state.history] == list(range(1, EPOCHS + 1))
        assert all(tensor.isfinite().all() for tensor in run.state.kept_weights.values())

    if run is not None:  # numbers that could be its own, or that diverge
        refusal(finish)


def test_a_run_resumes_from_its_own_checkpoint(unfinished: Unfinished) -> None:
    run = try_resume(unfinished, unfinished.checkpoint)
    assert run is not None
    assert run.state.position == (1, 2)
    assert hash_tensors(run.state.checkpoint().tensors) == hash_tensors(unfinished.checkpoint.tensors)


ROW_CHANGES: list[dict[str, Any]] = [{"epoch": 2}, {"epoch": True}, {"pgd": "x"}, {"clean": None}, {"loss": [1]}]


@pytest.mark.parametrize("changes", ROW_CHANGES, ids=str)
def test_a_history_with_another_row_is_ignored(unfinished: Unfinished, changes: dict[str, Any]) -> None:
    (row,) = unfinished.checkpoint.values["history"]
    values = {**unfinished.checkpoint.values, "history": [row | changes]}
    assert try_resume(unfinished, Checkpoint(unfinished.checkpoint.tensors, values)) is None


@pytest.mark.parametrize("column", ["epoch", "loss", "clean", "pgd", "gate_shift", "load_left"])
def test_a_history_without_a_column_is_ignored(unfinished: Unfinished, column: str) -> None:
    (row,) = unfinished.checkpoint.values["history"]
    values = {**unfinished.checkpoint.values, "history": [{key: row[key] for key in row if key != column}]}
    assert try_resume(unfinished, Checkpoint(unfinished.checkpoint.tensors, values)) is None


VALUES_CHANGES: list[dict[str, Any]] = [
    {"history": []},
    {"work": [1, 2]},
    {"work": [1, 2, -1]},
    {"work": [1, 2, 0.5]},
    {"seconds": None},
    {"seconds": float("nan")},
    {"more": 1},
]


@pytest.mark.parametrize("changes", VALUES_CHANGES, ids=str)
def test_other_values_are_ignored(unfinished: Unfinished, changes: dict[str, Any]) -> None:
    values = {**unfinished.checkpoint.values, **changes}
    assert try_resume(unfinished, Checkpoint(unfinished.checkpoint.tensors, values)) is None


def test_more_epochs_than_the_training_has_are_ignored(unfinished: Unfinished) -> None:
    (row,) = unfinished.checkpoint.values["history"]
    values = {**unfinished.checkpoint.values, "history": [row | {"epoch": number} for number in (1, 2, 3)]}
    assert try_resume(unfinished, Checkpoint(unfinished.checkpoint.tensors, values)) is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("epoch/losses", torch.zeros(STEPS + 1)),
        ("epoch/losses", torch.full((2,), torch.nan)),
        ("streams/noise", torch.zeros(5056, dtype=torch.uint8)),
        ("streams/more", torch.zeros(5056, dtype=torch.uint8)),
        ("task/turn", torch.tensor(0.5)),
        ("task/gate_norms", torch.zeros(2, 2)),
        ("task/more", torch.zeros(2)),
        ("momentum/99999", torch.zeros(2)),
        ("more", torch.zeros(1)),
        ("/", torch.zeros(1)),
    ],
)
def test_another_tensor_is_ignored(
    unfinished: Unfinished, name: str, tensor: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Checkpoint({**unfinished.checkpoint.tensors, name: tensor}, unfinished.checkpoint.values)
    assert try_resume(unfinished, changed) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {unfinished.file} ")
    assert said.endswith(" and ignored; mixture starts from the beginning\n")


# ---- evaluation


@fuzz(60)
@given(data=st.data())
def test_any_forged_batch_of_an_evaluation(data: st.DataObject) -> None:
    store = BatchStore({"attack": "pgd"})
    store.add(finished_batch())
    (file,) = store.work_dir.folder.glob("*.safetensors")
    whole = storage.load_checkpoint(file)
    assert whole is not None
    assert storage.save_checkpoint(file, data.draw(forged(whole)))
    with watched():
        for found in store.load(IMAGES, BALL):
            assert len(found.rows.unique()) == len(found.rows)  # type: ignore[no-untyped-call]
            assert (found.images - IMAGES[found.rows]).abs().max() <= BALL.epsilon + 1e-5
            assert found.overshoot.dtype == torch.bool
            assert json.dumps([found.forward, found.backward, found.seconds], allow_nan=False)
    store.clear()


def test_an_image_outside_the_ball_and_a_repeated_one_are_attacked_again(capsys: pytest.CaptureFixture[str]) -> None:
    store, whole = BatchStore({"attack": "pgd"}), finished_batch()
    store.add(whole)
    (file,) = store.work_dir.folder.glob("*.safetensors")
    tensors = {"rows": whole.rows, "images": whole.images, "overshoot": whole.overshoot}
    work = {"forward": 7, "backward": 8, "seconds": 0.25}
    again = file.with_name("99999999-2.safetensors")
    assert storage.save_checkpoint(again, Checkpoint(tensors, work))
    assert len(store.load(IMAGES, BALL)) == 1
    assert f"{again} is not a batch of this attack" in capsys.readouterr().err
    assert storage.save_checkpoint(file, Checkpoint({**tensors, "images": 1 - whole.images}, work))
    again.unlink()
    assert store.load(IMAGES, BALL) == []
    assert f"{file} is not a batch of this attack and ignored; its images are attacked again" in (
        capsys.readouterr().err
    )
    store.clear()

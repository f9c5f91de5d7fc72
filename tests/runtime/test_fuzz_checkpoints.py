"""Unfinished work whose checksums are right and whose content is not: taken over only where it can be its own.

Damage does not know the checksum (tests/test_fuzz_artifacts.py); here somebody wrote another file in its place.
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
from test_checkpoints import BALL, IMAGES, part
from test_fuzz_artifacts import altered
from test_resume_training import EPOCHS, STEPS, alternating
from torch import Tensor

from advmoe.core.artifacts import hash_tensors
from advmoe.evaluation.batch_store import BatchStore
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import storage
from advmoe.runtime.checkpoints.manager import CheckpointManager
from advmoe.runtime.checkpoints.storage import CHECKSUM, VALUES, Checkpoint
from advmoe.training.trainer import Trainer, TrainingJob, TrainingTask


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def kept_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One folder for all cases of a test."""
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(root))
    machine.machine.cache_clear()
    storage.warn_once.cache_clear()
    yield
    machine.machine.cache_clear()


@st.composite
def forged(draw: Draw, whole: Checkpoint) -> Checkpoint:
    """A snapshot with other tensors, other values, or both."""
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
def test_values_that_are_none_are_refused(root: Path, values: bytes | None) -> None:
    tensors = {} if values is None else {VALUES: torch.tensor(list(values), dtype=torch.uint8)}
    file = root / "a.safetensors"
    file.write_bytes(to_safetensors(tensors, metadata={CHECKSUM: hash_tensors(tensors)}))
    assert refusal(lambda: storage.load_checkpoint(file)) == f"{file} is damaged"
    file.unlink()


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 2), torch.full((2,), torch.nan), torch.tensor(3, dtype=torch.uint8), torch.tensor([-1])]
)
def test_values_of_another_type_are_refused(root: Path, values: Tensor) -> None:
    file = root / "a.safetensors"
    file.write_bytes(to_safetensors({VALUES: values}, metadata={CHECKSUM: hash_tensors({VALUES: values})}))
    assert refusal(lambda: storage.load_checkpoint(file)) == f"{file} is damaged"
    file.unlink()


# ---- training


class Killed(BaseException):
    """Not to be caught."""


@dataclass(frozen=True)
class Unfinished:
    """A mixture whose training was killed in its second epoch: what it was made of, its file, and what is in that."""

    learner: TrainingTask
    course: TrainingJob
    file: Path
    snapshot: Checkpoint

    def anew(self) -> Trainer:
        """The same run at its beginning."""
        return Trainer(copy.deepcopy(self.learner), self.course)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Unfinished:
    file = tmp_path_factory.mktemp("unfinished") / "a.safetensors"
    made: list[tuple[TrainingTask, TrainingJob]] = []

    def begin(learner: TrainingTask, course: TrainingJob) -> NoReturn:
        made.append((copy.deepcopy(learner), course))
        run = Trainer(learner, course)

        def look() -> None:
            if run.position == (1, 2):
                assert storage.save_checkpoint(file, run.state())
                raise Killed

        while True:
            run.epoch(look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advmoe.training.joint.fit", begin)
        with pytest.raises(Killed):
            alternating(None)
    snapshot = storage.load_checkpoint(file)
    assert snapshot is not None
    return Unfinished(*made[0], file, snapshot)


def printed(run: Trainer) -> str:
    """All of a run, but the time that goes by."""
    found = run.state()
    return f"{hash_tensors(found.tensors)} {dict(found.values) | {'seconds': 0}}"


def refused(unfinished: Unfinished, snapshot: Checkpoint) -> Trainer | None:
    """None when the file was left aside and the run is as at its beginning, else the run that took it over."""
    assert storage.save_checkpoint(unfinished.file, snapshot)
    run = unfinished.anew()
    before = printed(run)
    with watched():
        CheckpointManager(run, "mixture", unfinished.file).resume()
    if run.position == (0, 0):
        assert printed(run) == before
        return None
    return run


@fuzz(40)
@given(data=st.data())
def test_any_forged_training(unfinished: Unfinished, data: st.DataObject) -> None:
    run = refused(unfinished, data.draw(forged(unfinished.snapshot)))

    def go_on() -> None:
        assert run is not None
        while not run.is_over:
            run.epoch(lambda: None)
        assert [row["epoch"] for row in run.history] == list(range(1, EPOCHS + 1))
        assert all(tensor.isfinite().all() for tensor in run.weights.values())

    if run is not None:  # numbers that may as well be its own, or such as diverge
        refusal(go_on)


def test_training_that_is_its_own_is_taken_over(unfinished: Unfinished) -> None:
    run = refused(unfinished, unfinished.snapshot)
    assert run is not None
    assert run.position == (1, 2)
    assert hash_tensors(run.state().tensors) == hash_tensors(unfinished.snapshot.tensors)


ROW_CHANGES: list[dict[str, Any]] = [{"epoch": 2}, {"epoch": True}, {"pgd": "x"}, {"clean": None}, {"loss": [1]}]


@pytest.mark.parametrize("changes", ROW_CHANGES, ids=str)
def test_a_history_with_another_row_is_left_aside(unfinished: Unfinished, changes: dict[str, Any]) -> None:
    (row,) = unfinished.snapshot.values["history"]
    values = {**unfinished.snapshot.values, "history": [row | changes]}
    assert refused(unfinished, Checkpoint(unfinished.snapshot.tensors, values)) is None


@pytest.mark.parametrize("column", ["epoch", "loss", "clean", "pgd", "gate_shift", "load_left"])
def test_a_history_without_a_column_is_left_aside(unfinished: Unfinished, column: str) -> None:
    (row,) = unfinished.snapshot.values["history"]
    values = {**unfinished.snapshot.values, "history": [{key: row[key] for key in row if key != column}]}
    assert refused(unfinished, Checkpoint(unfinished.snapshot.tensors, values)) is None


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
def test_other_values_are_left_aside(unfinished: Unfinished, changes: dict[str, Any]) -> None:
    values = {**unfinished.snapshot.values, **changes}
    assert refused(unfinished, Checkpoint(unfinished.snapshot.tensors, values)) is None


def test_more_epochs_than_there_are_to_be_are_left_aside(unfinished: Unfinished) -> None:
    (row,) = unfinished.snapshot.values["history"]
    values = {**unfinished.snapshot.values, "history": [row | {"epoch": number} for number in (1, 2, 3)]}
    assert refused(unfinished, Checkpoint(unfinished.snapshot.tensors, values)) is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("epoch/losses", torch.zeros(STEPS + 1)),
        ("epoch/losses", torch.full((2,), torch.nan)),
        ("streams/noise", torch.zeros(5056, dtype=torch.uint8)),
        ("streams/more", torch.zeros(5056, dtype=torch.uint8)),
        ("learner/turn", torch.tensor(0.5)),
        ("learner/gate_norms", torch.zeros(2, 2)),
        ("learner/more", torch.zeros(2)),
        ("momentum/99999", torch.zeros(2)),
        ("more", torch.zeros(1)),
        ("/", torch.zeros(1)),
    ],
)
def test_another_tensor_is_left_aside(
    unfinished: Unfinished, name: str, tensor: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Checkpoint({**unfinished.snapshot.tensors, name: tensor}, unfinished.snapshot.values)
    assert refused(unfinished, changed) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {unfinished.file} ")
    assert said.endswith(" and left aside; mixture begins anew\n")


# ---- evaluation


@fuzz(60)
@given(data=st.data())
def test_any_forged_batch_of_an_evaluation(data: st.DataObject) -> None:
    store = BatchStore({"attack": "pgd"})
    store.add(part())
    (file,) = store.place.folder.glob("*.safetensors")
    whole = storage.load_checkpoint(file)
    assert whole is not None
    assert storage.save_checkpoint(file, data.draw(forged(whole)))
    with watched():
        for found in store.parts(IMAGES, BALL):
            assert len(found.rows.unique()) == len(found.rows)  # type: ignore[no-untyped-call]
            assert (found.images - IMAGES[found.rows]).abs().max() <= BALL.epsilon + 1e-5
            assert found.overshoot.dtype == torch.bool
            assert json.dumps([found.forward, found.backward, found.seconds], allow_nan=False)
    store.clear()


def test_an_image_outside_the_ball_and_one_met_twice_are_attacked_again(capsys: pytest.CaptureFixture[str]) -> None:
    store, whole = BatchStore({"attack": "pgd"}), part()
    store.add(whole)
    (file,) = store.place.folder.glob("*.safetensors")
    tensors = {"rows": whole.rows, "images": whole.images, "overshoot": whole.overshoot}
    spent = {"forward": 7, "backward": 8, "seconds": 0.25}
    again = file.with_name("99999999-2.safetensors")
    assert storage.save_checkpoint(again, Checkpoint(tensors, spent))
    assert len(store.parts(IMAGES, BALL)) == 1
    assert f"{again} is not as this attack writes it" in capsys.readouterr().err
    assert storage.save_checkpoint(file, Checkpoint({**tensors, "images": 1 - whole.images}, spent))
    again.unlink()
    assert store.parts(IMAGES, BALL) == []
    assert f"{file} is not as this attack writes it and left aside; its images are attacked again" in (
        capsys.readouterr().err
    )
    store.clear()

"""Resume of interrupted studies: attacks that work in rounds, crafted poisoned sets, and measured results."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import EXTRACT, LEARNING, ROOT, Advmoe, Edit, save_tiny_mixture, sentence
from torch import Tensor

from advmoe.core import artifacts, paths
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import manager, storage
from advmoe.threats import victim_training
from advmoe.threats.extraction import dfme
from advmoe.threats.extraction import experiment as extraction
from advmoe.threats.extraction import metrics as stolen
from advmoe.threats.poisoning import experiment as poisoning
from advmoe.threats.poisoning import metrics as poisoned
from advmoe.threats.poisoning import registry, unlearnable
from advmoe.training import trainer as training

ROUNDS = 4
DFME = {"kind": "dfme", "batch_size": 4, "latent": 4, "width": 2, "directions": 1, "step": 4, "learning": 2}
QUERIES = 4 * (1 + 1 + 2)  # in each round
STUDY = {"victims": ["mixture"], "answers": ["soft"], "surrogates": ["same"], "seeds": [0]}
EXTRACTION = EXTRACT | {"images": 12, "recipe": LEARNING | {"batch_size": 100}}
UNLEARNABLE = {
    "kind": "unlearnable",
    "epsilon": 0.1,
    "steps": 1,
    "step_size": 0.5,
    "rounds": ROUNDS,
    "learning_steps": 2,
    "batch_size": 8,
    "lr": 0.1,
    "stop": 0.0,
}
QUICKLY = {"pretrain.batch_size": 500, "pretrain.validation.images": 6}
POISON = {"rates": [0.02], "victims": ["standard"], "seeds": [0], "defences": []}


class Killed(BaseException):
    """Not to be caught."""


@pytest.fixture(autouse=True)
def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Saves a checkpoint after every step; caches of other projects are cleared."""
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "0")
    monkeypatch.setattr(manager, "MAX_TIME_SHARE", float("inf"))
    monkeypatch.setattr(artifacts, "_git", lambda *_: None)  # asked twice for every file, and this is no repository
    machine.machine.cache_clear()
    storage.warn_once.cache_clear()
    remembered = (victim_training._clean_dataset, extraction._dataset)
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


def tracked() -> dict[str, bytes]:
    """All files of a study except the sidecars, which contain timings."""
    found = [path for name in ("artifacts", "metrics", "plots") for path in Path(name).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found if not path.name.endswith(".run.json")}


def remove_results() -> None:
    """Removes the files of studies."""
    for path in [path for name in ("artifacts", "metrics", "plots") for path in Path(name).rglob("*")]:
        if path.is_file() and {"extract", "extract-runs", "poison", "poison-runs"} & set(path.parts):
            path.unlink()


def unfinished() -> list[Path]:
    return list(machine.machine().state_dir.iterdir())


# ---- loops of rounds


@dataclass(frozen=True)
class Loop:
    """An attack that works in rounds: its command, what it needs in params.yaml, and what every round calls."""

    command: tuple[str, str]
    changes: dict[str, Any]
    owner: type
    method: str
    title: str
    progress: str


LOOPS = {
    "dfme": Loop(
        ("extract", "dfme"),
        {"extract": EXTRACTION | {"attacks": {"dfme": STUDY | {"attack": DFME, "budgets": [ROUNDS * QUERIES]}}}},
        dfme._DfmeTrainer,
        "update_generator",
        "dfme on mixture",
        f"{2 * QUERIES} queries",
    ),
    "unlearnable": Loop(
        ("poison", "noisy"),
        QUICKLY | {"poison.attacks": {"noisy": POISON | {"attack": UNLEARNABLE}}},
        unlearnable._NoiseOptimization,
        "_train_network",
        "unlearnable rate-0.02-seed-0-trial-0",
        "2 rounds",
    ),
}
Each = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
Interrupt = Callable[[Loop, int | None, Callable[[], None]], list[None]]


@pytest.fixture
def in_round(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """`in_round(loop, 2, happens)`: something happens in the second round from here; returns the rounds begun."""
    originals = {loop.owner: getattr(loop.owner, loop.method) for loop in LOOPS.values()}

    def plant(loop: Loop, number: int | None, happens: Callable[[], None]) -> list[None]:
        begun: list[None] = []

        def watched(self: object, *arguments: object) -> None:
            begun.append(None)
            originals[loop.owner](self, *arguments)
            if len(begun) == number:
                happens()

        monkeypatch.setattr(loop.owner, loop.method, watched)
        return begun

    return plant


def die() -> None:
    raise Killed


@Each
def test_a_study_killed_in_every_round_has_the_same_results(
    loop: Loop, advmoe: Advmoe, project: Path, edit: Edit, in_round: Interrupt
) -> None:
    del project
    edit(loop.changes)
    whole = in_round(loop, None, die)
    assert advmoe(*loop.command).code == 0
    assert len(whole) == ROUNDS
    expected = tracked()
    assert unfinished() == []
    remove_results()
    for _ in range(ROUNDS - 1):
        in_round(loop, 2, die)  # one round is kept, the second is lost
        with pytest.raises(Killed):
            advmoe(*loop.command)
    last = in_round(loop, None, die)
    assert advmoe(*loop.command).code == 0
    assert len(last) == 1
    assert tracked() == expected
    assert unfinished() == []


@Each
def test_checkpoints_do_not_depend_on_other_studies(
    loop: Loop, advmoe: Advmoe, project: Path, edit: Edit, in_round: Interrupt
) -> None:
    del project
    edit(loop.changes)
    in_round(loop, 2, die)
    with pytest.raises(Killed):
        advmoe(*loop.command)
    section, name = loop.command
    studies = next(value for key, value in loop.changes.items() if key.startswith(section))
    study = studies.get("attacks", studies)[name]
    edit({f"{section}.attacks": {name: study, "another": study}})
    last = in_round(loop, None, die)
    assert advmoe(*loop.command).code == 0
    assert len(last) == ROUNDS - 1
    assert unfinished() == []


@pytest.fixture
def python_hears_signals() -> Iterator[None]:
    """As in the foreground: who starts the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@Each
@pytest.mark.usefixtures("python_hears_signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_resume(
    loop: Loop,
    number: signal.Signals,
    code: int,
    advmoe: Advmoe,
    project: Path,
    edit: Edit,
    in_round: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del project
    monkeypatch.setenv("ADVMOE_STATE_SECONDS", "1000")  # too long to be saved for another reason
    edit(loop.changes)
    in_round(loop, 2, lambda: signal.raise_signal(number))
    ran = advmoe(*loop.command)
    assert ran.code == code
    assert f"{loop.title}: checkpoint saved; run the same command again to resume" in ran.out
    rest = in_round(loop, None, die)
    ran = advmoe(*loop.command)
    assert ran.code == 0
    assert len(rest) == ROUNDS - 2
    assert f"{loop.title}: resumed from a checkpoint, after {loop.progress}" in ran.out


@Each
def test_a_damaged_checkpoint_is_named_and_not_used(
    loop: Loop, advmoe: Advmoe, project: Path, edit: Edit, in_round: Interrupt
) -> None:
    del project
    edit(loop.changes)
    in_round(loop, 3, die)
    with pytest.raises(Killed):
        advmoe(*loop.command)
    (file,) = (path for label in ("attack-*", "crafting-*") for path in machine.machine().state_dir.rglob(label))
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 4
    file.write_bytes(bytes(whole))
    again = in_round(loop, None, die)
    ran = advmoe(*loop.command)
    assert f"warning: {file} is damaged and ignored; {loop.title} starts from the beginning" in ran.err
    assert len(again) == ROUNDS


def test_another_victim_is_queried_from_the_start(
    advmoe: Advmoe, project: Path, edit: Edit, in_round: Interrupt
) -> None:
    loop = LOOPS["dfme"]
    edit(loop.changes)
    in_round(loop, 3, die)
    with pytest.raises(Killed):
        advmoe(*loop.command)
    save_tiny_mixture(project / paths.MIXTURE, seed=1)
    begun = in_round(loop, None, die)
    assert advmoe(*loop.command).code == 0
    assert len(begun) == ROUNDS


def test_a_quick_run_is_resumed(advmoe: Advmoe, project: Path, edit: Edit, in_round: Interrupt) -> None:
    del project
    loop = LOOPS["dfme"]
    edit(loop.changes)
    in_round(loop, 3, die)
    question = (*loop.command, "--budget", str((ROUNDS + 1) * QUERIES))
    with pytest.raises(Killed):
        advmoe(*question)
    begun = in_round(loop, None, die)
    assert advmoe(*question).code == 0
    assert len(begun) == ROUNDS + 1 - 2


# ---- what is done once


KNOCKOFF = STUDY | {"attack": {"kind": "knockoff", "pool": {"kind": "in-distribution"}}, "budgets": [10, 20]}
BADNETS = POISON | {
    "attack": {"kind": "badnets", "size": 2, "target": 0},
    "rates": [0.1, 0.2],
    "defences": ["spectral"],
}
BREW = {"kind": "witches-brew", "epsilon": 0.1, "steps": 1, "step_size": 0.5, "restarts": 1, "targets": 3}
MEASURED: dict[str, tuple[tuple[str, str], dict[str, Any], list[tuple[Any, str, int]]]] = {
    "extract": (  # a control and a surrogate at each budget, beside the victim
        ("extract", "knockoff"),
        {"extract": EXTRACTION | {"attacks": {"knockoff": KNOCKOFF}}},
        [(stolen, "surrogate_answers", 3), (stolen, "victim_answers", 1)],
    ),
    "poison": (  # a twin, a victim at each rate, and what is left of these without what was flagged
        ("poison", "badnets"),
        QUICKLY | {"poison.attacks": {"badnets": BADNETS}},
        [(poisoned, "predict_clean_and_robust", 5), (poisoning, "flag_poison", 2)],
    ),
    "craft": (  # for each of three targets
        ("poison", "brew"),
        QUICKLY | {"poison.attacks": {"brew": POISON | {"attack": BREW | {"proxy": "standard"}}}},
        [(registry, "poison", 3)],
    ),
}


@pytest.mark.parametrize("study", MEASURED)
def test_finished_steps_are_not_repeated_after_a_kill(
    study: str, advmoe: Advmoe, project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    del project
    command, changes, watched = MEASURED[study]
    edit(changes)

    def count(owner: Any, name: str, limit: int) -> list[None]:
        calls: list[None] = []
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == limit:
                raise Killed
            return original(*arguments, **options)

        patch.setattr(owner, name, counted)
        return calls

    with monkeypatch.context() as patch:
        whole = [count(owner, name, 0) for owner, name, _ in watched]
        assert advmoe(*command).code == 0
    assert [len(calls) for calls in whole] == [times for _, _, times in watched]
    expected = tracked()
    remove_results()
    with monkeypatch.context() as patch:
        owner, name, times = watched[0]
        count(owner, name, times)  # the last one
        with pytest.raises(Killed):
            advmoe(*command)
    with monkeypatch.context() as patch:
        rest, *nothing = [count(owner, name, 0) for owner, name, _ in watched]
        assert advmoe(*command).code == 0
    assert len(rest) == 1
    assert not any(nothing)
    assert tracked() == expected
    assert unfinished() == []


# ---- two at once


def started(folder: Path, state_dir: Path, *command: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(machine.PREFIX)}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ADVMOE_THREADS": "1",
        "ADVMOE_STATE_DIR": str(state_dir),
        "ADVMOE_STATE_SECONDS": "0",
    }
    arguments = [sys.executable, "-m", "advmoe", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe)


def test_two_processes_with_the_same_work_have_correct_results(project: Path, tmp_path: Path, edit: Edit) -> None:
    """As two experiments of a queue: copies of a checkout, one folder of unfinished work."""
    edit({"pretrain.epochs": 3})
    folders = [shutil.copytree(project, tmp_path / name) for name in ("alone", "left", "right")]
    file = paths.artifact("pretrain", "clean")
    assert started(folders[0], tmp_path / "own", "pretrain", "clean").wait() == 0
    both = [started(folder, tmp_path / "shared", "pretrain", "clean") for folder in folders[1:]]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({(folder / file).read_bytes() for folder in folders}) == 1
    assert list((tmp_path / "shared").iterdir()) == []


def test_params_that_change_during_a_stage_are_refused(
    advmoe: Advmoe, project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a second `make repro PROFILE=...` in the same checkout; what the stage does not read may change."""
    del project
    edit({"pretrain.epochs": 1} | QUICKLY)
    original = training.Trainer.step

    def change(key: str, value: int) -> None:
        def step(self: training.Trainer, images: Tensor, labels: Tensor) -> Tensor:
            edit({key: value})
            return original(self, images, labels)

        monkeypatch.setattr(training.Trainer, "step", step)

    change("train.epochs", 2)
    assert advmoe("pretrain", "clean").code == 0
    change("pretrain.epochs", 2)
    ran = advmoe("pretrain", "clean")
    assert sentence(ran) == "params.yaml: 'pretrain' was changed during the run; run it again"
    assert advmoe("attacks").code == 0  # no stage: nothing to compare

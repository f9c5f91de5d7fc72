"""Fixtures: one thread and a clean environment for every test, and small projects on demand."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from advmoe import cli
from advmoe.core import paths
from advmoe.core.files import write_text
from advmoe.data import dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, GateSettings, MixtureArchitecture
from advmoe.runtime import machine

ROOT = Path(__file__).parent.parent
EXPERTS = ("clean", "pgd-1")
SMALL: dict[str, Any] = {  # overrides of params.yaml with which a run takes seconds, for any profile
    "seed": 0,
    "epsilon": 0.1,
    "model.width": 2,
    "prepare.source": {"kind": "digits"},
    "prepare.splits": {"pool": 270, "validation": 180, "test": 360},
    "pretrain.epochs": 1,
    "train.epochs": 1,
    "train.gate.width": 2,
    "evaluate.limit": 24,
    "evaluate.batch_size": 24,
    "evaluate.precision": "float32",
    "evaluate.presets": [],
    "evaluate.attacks": {
        "fgsm": {"kind": "fgsm"},
        "pgd": {"kind": "pgd", "steps": 2, "step_size": 0.5, "restarts": 1, "loss": "ce", "targets": 0},
    },
    "evaluate.limits": {},
    "evaluate.experts": ["pgd"],
    "evaluate.checks": {"images": 6, "steps": 2, "samples": 20},
    "evaluate.minimal": {"kind": "fab-t", "steps": 2, "targets": 1, "restarts": 1},
    "poison.images": 24,
    "poison.robust": {"kind": "pgd", "steps": 2, "step_size": 0.5, "restarts": 1, "loss": "ce", "targets": 0},
    "poison.attacks": {
        "badnets": {
            "attack": {"kind": "badnets", "size": 2, "target": 0},
            "rates": [0.1],
            "victims": ["standard"],
            "seeds": [0],
            "defences": [],
        }
    },
}

LEARNING: dict[str, Any] = {  # a short training config of surrogates
    "epochs": 1,
    "batch_size": 16,
    "micro_batch": None,
    "optimizer": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005},
    "schedule": {"warmup": 0.1, "decay": "cosine"},
    "clip": 0.0,
    "ema": 0.0,
    "augmentation": {"crop": 0, "flip": False},
    "precision": "float32",
}
EXTRACT: dict[str, Any] = {  # a minimal `extract` section
    "images": None,
    "noise": 1,
    "robust": {"kind": "pgd", "steps": 1, "step_size": 1.0, "restarts": 1, "loss": "ce", "targets": 0},
    "detector": {"delta": 0.9, "least": 5, "every": 5},
    "surrogates": {"same": {"kind": "cnn", "width": 2}},
    "steps": 1,
    "recipe": LEARNING,
}

Edit = Callable[[dict[str, Any]], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs files that take minutes first, in parallel with all others."""
    slow = {item.path for item in items if item.get_closest_marker("pipeline")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def one_thread_and_a_clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Removes ADVMOE_* variables of the caller; resets threads and determinism after each test."""
    for name in [name for name in os.environ if name.startswith(machine.PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ADVMOE_STATE_DIR", str(tmp_path_factory.mktemp("state")))  # no checkpoints of other tests
    machine.machine.cache_clear()
    torch.set_num_threads(1)
    yield
    machine.machine.cache_clear()
    if torch.are_deterministic_algorithms_enabled():  # the call imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(False)


def edit_params(changes: dict[str, Any]) -> None:
    """Sets dotted keys in ./params.yaml."""
    yaml = YAML()
    yaml.width = 4096
    file = Path("params.yaml")
    content = yaml.load(file.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            section = section[parent]
        section[last] = value
    with file.open("w") as handle:
        yaml.dump(content, handle)


@pytest.fixture
def edit() -> Edit:
    """`edit({"model.width": 3})` sets dotted keys in ./params.yaml."""
    return edit_params


def copy_inputs(folder: Path) -> None:
    """Copies the project's params.yaml, dvc.yaml, profiles and metrics/aggregate.json."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    (folder / "metrics").mkdir()
    shutil.copy(ROOT / "metrics" / "aggregate.json", folder / "metrics")


@pytest.fixture(scope="session")
def built_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with prepared digits and an untrained mixture: built once, copied by `project`."""
    from stages import prepare

    folder = tmp_path_factory.mktemp("built")
    copy_inputs(folder)
    with contextlib.chdir(folder):
        edit_params(SMALL)
        prepare.run()
        save_tiny_mixture(paths.MIXTURE)
    return folder


def save_tiny_mixture(path: Path, seed: int = 0) -> None:
    """Saves an untrained mixture of two experts of width 2 for the prepared data, with BatchNorm statistics."""
    data = dataset.load(paths.DATASET)
    architecture = MixtureArchitecture(
        kind="mixture",
        backbone=BackboneSettings(kind="resnet18", width=2),
        experts=EXPERTS,
        gate=GateSettings(width=2, temperature=1.0),
        mixing="probabilities",
    )
    model = classifiers.build(architecture, data.facts, seed, "tiny")
    with torch.no_grad():  # running statistics other than 0 and 1
        model.train()(data["train"].pixels()[:64])
    model.eval()
    inputs, metrics = {"dataset": data.sha256}, {"cost": {"total_training_flops": 3_000_000_000 + seed}}
    classifiers.save(
        path, model, architecture, data.facts, params={}, inputs=inputs, seed=0, metrics=metrics, seconds=0.0
    )


@pytest.fixture
def project(built_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small project; the test runs inside it."""
    folder = tmp_path / "project"
    shutil.copytree(built_project, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def inputs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The inputs of this checkout without any outputs; the test runs inside."""
    copy_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def params_file(tmp_path: Path) -> Callable[[str], Path]:
    """`params_file(text)` writes a params.yaml and returns its path."""

    def write(text: str) -> Path:
        write_text(tmp_path / "params.yaml", text)
        return tmp_path / "params.yaml"

    return write


@dataclass(frozen=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Advmoe = Callable[..., Ran]


@pytest.fixture
def advmoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Advmoe:
    """`advmoe("use", "cifar10")` runs the entry point in this process, on one thread."""
    monkeypatch.setenv("ADVMOE_THREADS", "1")

    def call(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["advmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        said = capsys.readouterr()
        return Ran(code if isinstance(code, int) else int(code is not None), said.out, said.err)

    return call


def sentence(ran: Ran) -> str:
    """Returns the error message of a command, checking exit code 2 and a single line of output."""
    assert ran.code == 2, ran
    assert "Traceback" not in ran.out + ran.err
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")

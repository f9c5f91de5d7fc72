"""Settings of the machine from environment variables, and seeds."""

import re
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch

from advmoe.core.errors import UserError
from advmoe.runtime import machine
from advmoe.runtime.machine import derive_seed

SetVariable = Callable[[str, str], None]


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> SetVariable:
    """`variable("ADVMOE_DEVICE", "cpu")` sets a variable and reads the settings again."""

    def put(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        machine.machine.cache_clear()

    return put


def test_without_variables_there_are_defaults() -> None:
    settings = machine.machine()
    assert (settings.device, settings.threads, settings.compile) == ("auto", 0, False)
    assert settings.cache_dir.name == "advmoe"
    assert settings.state_seconds == 30


def test_checkpoints_are_stored_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADVMOE_STATE_DIR", raising=False)
    machine.machine.cache_clear()
    assert machine.machine().state_dir == machine.machine().cache_dir / "state"


def test_variables_are_read(variable: SetVariable) -> None:
    variable("ADVMOE_DEVICE", "cpu")
    variable("ADVMOE_THREADS", "3")
    variable("ADVMOE_CACHE_DIR", "/somewhere")
    settings = machine.machine()
    assert (settings.device, settings.threads, str(settings.cache_dir)) == ("cpu", 3, "/somewhere")
    assert machine.device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["ADVMOE_EPSILON", "ADVMOE_DEVISE", "ADVMOE_"])
def test_an_unknown_variable_is_refused(variable: SetVariable, name: str) -> None:
    variable(name, "0.1")
    known = (
        "ADVMOE_CACHE_DIR, ADVMOE_COMPILE, ADVMOE_DEVICE, ADVMOE_GRAPHS, ADVMOE_STATE_DIR, ADVMOE_STATE_SECONDS, "
        "ADVMOE_THREADS"
    )
    with pytest.raises(UserError, match=f"^environment: {name} is not known; known are {known}$"):
        machine.machine()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADVMOE_DEVICE", "tpu"),
        ("ADVMOE_DEVICE", "cuda:x"),
        ("ADVMOE_DEVICE", ""),
        ("ADVMOE_THREADS", "two"),
        ("ADVMOE_THREADS", "-1"),
        ("ADVMOE_THREADS", "1.5"),
        ("ADVMOE_STATE_SECONDS", "-1"),
    ],
)
def test_a_bad_value_is_refused(variable: SetVariable, name: str, value: str) -> None:
    variable(name, value)
    with pytest.raises(UserError, match=f"(?i)^environment: {name}: .*, got '{value}'$"):
        machine.machine()


def test_an_invalid_value_is_reported_with_its_variable(variable: SetVariable) -> None:
    variable("ADVMOE_THREADS", "two")
    with pytest.raises(UserError, match="ADVMOE_THREADS"):
        machine.machine()


@pytest.mark.parametrize(("wanted", "backend"), [("cuda", "cuda"), ("cuda:1", "cuda"), ("mps", "mps")])
def test_a_missing_device_is_refused(
    variable: SetVariable, monkeypatch: pytest.MonkeyPatch, wanted: str, backend: str
) -> None:
    backend_module = torch.cuda if backend == "cuda" else torch.backends.mps
    monkeypatch.setattr(backend_module, "is_available", lambda: False)
    variable("ADVMOE_DEVICE", wanted)
    expected = f"environment: ADVMOE_DEVICE={wanted}, but PyTorch finds no such device here"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        machine.device()


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_best_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert machine.device().type == expected


def test_prepare_torch_sets_threads_and_determinism(variable: SetVariable) -> None:
    variable("ADVMOE_THREADS", "2")
    machine.prepare_torch()
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()


def test_describe_lists_device_threads_and_versions(variable: SetVariable) -> None:
    variable("ADVMOE_DEVICE", "cpu")
    variable("ADVMOE_CACHE_DIR", "/somewhere")
    rows = dict(machine.describe())
    assert rows["device"].startswith("cpu (")
    assert rows["threads"].startswith("1 of ")
    assert (rows["cache folder"], rows["torch"]) == ("/somewhere", version("torch"))
    assert rows["unfinished work"] == f"{machine.machine().state_dir}, every 30 s"


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    machine.refuse_unknown_launchers()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^environment: started as 4 processes \(WORLD_SIZE\)"):
        machine.refuse_unknown_launchers()


def test_seeds_are_stable() -> None:
    # if these change, every artifact changes under unchanged parameters
    assert derive_seed(0, "fgsm-1", "shuffle") == 2554925726329611970
    assert derive_seed(0) == 3456079177858693020


def test_seeds_are_distinct_and_fit_a_generator() -> None:
    parts = [(seed, name, purpose) for seed in range(20) for name in ("a", "b", "ab") for purpose in ("x", "y")]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("a", "b") != derive_seed("b", "a")
    assert derive_seed("ab") != derive_seed("a", "b")


def test_generators_are_independent_of_each_other_and_of_the_global_state() -> None:
    first, second = machine.generator(0, "a"), machine.generator(0, "b")
    draws = torch.rand(4, generator=first)
    assert not torch.equal(draws, torch.rand(4, generator=second))
    torch.manual_seed(123)
    assert torch.equal(draws, torch.rand(4, generator=machine.generator(0, "a")))

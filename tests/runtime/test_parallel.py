"""parallel_map: order of results, pickling, and when it runs in this process."""

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advmoe.runtime import parallel
from advmoe.runtime.parallel import parallel_map

USED: list[int] = []


class Pool:
    """Replaces the process pool: runs in this process, and checks that arguments and results are bytes."""

    def __init__(self, count: int, *_: object) -> None:
        USED.append(count)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[[bytes], bytes], items: Iterable[bytes]) -> Iterator[bytes]:
        for item in items:
            assert isinstance(item, bytes)
            result = work(item)
            assert isinstance(result, bytes)
            yield result


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVMOE_DEVICE", "cpu")
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    USED.clear()


def double(item: Tensor) -> Tensor:
    return 2 * item


def fail(item: int) -> int:
    raise ZeroDivisionError(item)


@pytest.mark.parametrize(("threads", "items", "pools"), [(1, 3, 0), (2, 3, 1), (2, 1, 0), (2, 0, 0), (4, 2, 1)])
def test_workers_are_used_with_several_threads_and_items(threads: int, items: int, pools: int) -> None:
    torch.set_num_threads(threads)
    tensors = [torch.full((2,), float(number)) for number in range(items)]
    results = parallel_map(double, tensors)
    assert [tensor.tolist() for tensor in results] == [[2.0 * number] * 2 for number in range(items)]
    assert len(USED) == pools


@pytest.mark.parametrize("threads", [1, 2])
def test_exceptions_are_raised_in_this_process(threads: int) -> None:
    torch.set_num_threads(threads)
    with pytest.raises(ZeroDivisionError):
        parallel_map(fail, [1, 2])


def test_arguments_and_results_are_pickled() -> None:
    packed = parallel._call_pickled(double, pickle.dumps(torch.ones(2)))
    assert pickle.loads(packed).tolist() == [2, 2]  # noqa: S301  (trusted)


SCRIPT = """
import os, time
from pathlib import Path
import torch
from advmoe.runtime.parallel import parallel_map


def wait(name):
    Path(name).write_text(str(os.getpid()))
    time.sleep(300)


if __name__ == "__main__":
    torch.set_num_threads(2)
    parallel_map(wait, ["first", "second"])
"""


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "2", "ADVMOE_DEVICE": "cpu"}
    with subprocess.Popen([sys.executable, "work.py"], cwd=tmp_path, env=environment) as first:
        pids = [int(until((tmp_path / name).read_text)) for name in ("first", "second")]
        first.kill()
    assert until(lambda: not any(alive(pid) for pid in pids))


def until(condition: Callable[[], Any]) -> Any:
    """Returns the first true value of `condition()`; the test fails after two minutes."""
    for _ in range(1200):
        with contextlib.suppress(FileNotFoundError):
            value = condition()
            if value:
                return value
        time.sleep(0.1)
    return pytest.fail("waited for two minutes")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else True

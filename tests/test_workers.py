"""Work spread over processes: the order of results, what travels as bytes, and when it stays in this process."""

import pickle
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from advmoe import workers
from advmoe.workers import spread

USED: list[int] = []


class Pool:
    """In place of a pool of processes: does the work here, and insists on bytes both ways."""

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
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    USED.clear()


def double(item: Tensor) -> Tensor:
    return 2 * item


def fail(item: int) -> int:
    raise ZeroDivisionError(item)


@pytest.mark.parametrize(("threads", "items", "pools"), [(1, 3, 0), (2, 3, 1), (2, 1, 0), (2, 0, 0), (4, 2, 1)])
def test_work_is_spread_where_it_pays(threads: int, items: int, pools: int) -> None:
    torch.set_num_threads(threads)
    given = [torch.full((2,), float(number)) for number in range(items)]
    found = spread(double, given)
    assert [tensor.tolist() for tensor in found] == [[2.0 * number] * 2 for number in range(items)]
    assert len(USED) == pools


@pytest.mark.parametrize("threads", [1, 2])
def test_errors_are_raised_here(threads: int) -> None:
    torch.set_num_threads(threads)
    with pytest.raises(ZeroDivisionError):
        spread(fail, [1, 2])


def test_what_travels_is_unpacked_there() -> None:
    packed = workers._packed(double, pickle.dumps(torch.ones(2)))
    assert pickle.loads(packed).tolist() == [2, 2]  # noqa: S301  (our own)

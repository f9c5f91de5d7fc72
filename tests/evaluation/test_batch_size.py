"""Batch sizes that fit the memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.evaluation import batch_size
from advmoe.evaluation.batch_size import (
    MAX_BATCH_SIZE,
    MEMORY_FRACTION,
    estimate_batch_size,
    is_out_of_memory,
    map_batches,
)
from advmoe.runtime.machine import generator

IMAGES = torch.rand(3, 1, 8, 8, generator=generator("test_memory", "images"))


class Copies(nn.Module):
    """Saves `copies` tensors of an image's size for the backward pass, and its weights."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies, self.classify = copies, nn.Linear(64, 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        for _ in range(self.copies):
            images_BCHW = images_BCHW.sigmoid()  # its backward pass needs its output
        logits: Tensor = self.classify(images_BCHW.flatten(1))
        return logits


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(batch_size, "_free_memory", lambda _: int(free))


def test_a_batch_fills_its_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    image = 64 * 4  # bytes
    with_free(monkeypatch, 50 * 12 * image / MEMORY_FRACTION)
    assert estimate_batch_size(Copies(10), IMAGES) == 50  # ten copies kept, and twice its own size


def test_a_model_that_needs_more_memory_gets_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 300_000)
    sizes = [estimate_batch_size(Copies(copies), IMAGES) for copies in (2, 10, 50)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 4 * sizes[-1]


def test_larger_images_get_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 300_000)
    model = nn.Sequential(nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    small, large = (estimate_batch_size(model, torch.zeros(2, 1, side, side)) for side in (8, 16))
    assert small == pytest.approx(4 * large, rel=0.1)


def test_a_batch_has_at_least_one_image_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0)
    assert estimate_batch_size(Copies(3), IMAGES) == 1
    with_free(monkeypatch, 1e15)
    assert estimate_batch_size(Copies(3), IMAGES) == MAX_BATCH_SIZE


def test_the_size_of_the_weights_is_not_counted_for_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heavy(nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, wide), nn.Linear(wide, 1)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            logits: Tensor = self.second(self.first(images_BCHW.flatten(1)))
            return logits

    with_free(monkeypatch, 1_000_000)
    assert estimate_batch_size(Heavy(2000), IMAGES) > 10  # weights alone are 512 kB


def test_the_estimate_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 300_000)
    model, before = Copies(2), IMAGES.clone()
    with torch.no_grad():
        estimate_batch_size(model, IMAGES)
    assert torch.equal(IMAGES, before)
    assert not IMAGES.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_free_memory_of_this_machine_is_a_sound_number() -> None:
    assert 2**20 < batch_size._free_memory(torch.device("cpu")) < 2**50


def test_a_system_that_does_not_say_gets_an_assumption(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr("os.sysconf", unknown)
    assert batch_size._free_memory(torch.device("cpu")) == batch_size.ASSUMED_FREE_BYTES


def wrapped(cause: Exception | None) -> UserError:
    error = UserError("mine.py:attack raised something")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (wrapped(torch.cuda.OutOfMemoryError("CUDA out of memory.")), True),
        (wrapped(MemoryError()), True),
        (wrapped(RuntimeError("index out of range")), False),
        (wrapped(None), False),
        (UserError("params.yaml: out of memory: is not a known key"), False),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else str(value),
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def squares(room: int, seen: list[int]) -> Callable[[Tensor], Tensor]:
    """Returns a function that records the number of rows and raises out of memory above `room`."""

    def work(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        if len(rows) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return rows**2

    return work


@pytest.mark.parametrize(
    ("size", "room", "expected"),
    [
        (4, 99, [4, 4, 2]),
        (10, 99, [10]),
        (360, 3, [10, 5, 2, 2, 2, 2, 2]),  # ten are tried, not 360, 180, 90, ...
        (8, 1, [8, 4, 2, *[1] * 10]),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(size: int, room: int, expected: list[int]) -> None:
    seen: list[int] = []
    rows = torch.arange(10)
    found = list(map_batches(squares(room, seen), rows, size))
    assert seen == expected
    assert torch.equal(torch.cat([batch for batch, _ in found]), rows)
    assert torch.equal(torch.cat([done for _, done in found]), rows**2)


def test_a_row_that_does_not_fit_alone_and_other_errors_are_raised() -> None:
    seen: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        list(map_batches(squares(0, seen), torch.arange(5), 4))
    assert seen == [4, 2, 1]

    def broken(rows: Tensor) -> Tensor:
        raise RuntimeError(f"no idea what to do with {len(rows)}")

    with pytest.raises(RuntimeError, match="with 4"):
        list(map_batches(broken, torch.arange(5), 4))


def test_no_rows_are_no_work() -> None:
    assert list(map_batches(squares(0, []), torch.arange(0), 4)) == []

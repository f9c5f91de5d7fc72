"""Interleaved timing of several cases, so that load on the machine affects all of them.

Wall-clock seconds are what a user waits for. CPU seconds, summed over threads, are robust against other processes on
the same cores; with several threads they include waiting for each other, and on a GPU they are meaningless.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch

T = TypeVar("T")
Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Seconds:
    """Wall-clock and CPU seconds of one execution."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Timed(Generic[T]):
    """The last result of a case, and its times, one per round."""

    result: T
    rounds: tuple[Seconds, ...]

    def by(self, clock: Clock) -> list[float]:
        """Returns the seconds of each round."""
        return [float(getattr(seconds, clock)) for seconds in self.rounds]

    def median(self, clock: Clock) -> float:
        """Returns the median of the seconds of the rounds."""
        return statistics.median(self.by(clock))


@dataclass(frozen=True)
class Ratio:
    """The ratio of the times of two cases: median, minimum and maximum over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f} to {self.high:.2f}]"


def time_call(function: Callable[[], T]) -> tuple[T, Seconds]:
    """Returns the result of `function()` and its time."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    _synchronize()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _synchronize() -> None:
    """Waits for the GPU, which computes asynchronously."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(cases: Mapping[str, Callable[[], T]], rounds: int, *, warmup: bool = True) -> dict[str, Timed[T]]:
    """Runs every case once per round, with the order reversed in every second round; `warmup`: once before, not timed.

    Raises ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: at least 1 is needed, not {rounds}")
    for function in cases.values() if warmup else ():
        function()
    results: dict[str, T] = {}
    times: dict[str, list[Seconds]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            results[name], seconds = time_call(cases[name])
            times[name].append(seconds)
    return {name: Timed(results[name], tuple(times[name])) for name in cases}


def ratio(slow: Timed[T], fast: Timed[T], clock: Clock) -> Ratio:
    """Returns the ratio of the seconds of `slow` and `fast`, paired by round."""
    ratios = [numerator / denominator for numerator, denominator in zip(slow.by(clock), fast.by(clock), strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))

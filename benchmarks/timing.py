"""Times of several cases taken in turn, so that a bad minute of the machine falls on all of them.

Wall-clock seconds are what a user waits for. CPU seconds, summed over threads, tell cases apart where others compute on
the same cores; with several threads they also count waiting for each other, and with a GPU they tell nothing.
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
    """What one execution took, by both clocks."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A case: what it returned last, and its times, one for each round."""

    result: T
    rounds: tuple[Seconds, ...]

    def by(self, clock: Clock) -> list[float]:
        """Seconds of each round."""
        return [float(getattr(seconds, clock)) for seconds in self.rounds]

    def median(self, clock: Clock) -> float:
        """Seconds of a middling round."""
        return statistics.median(self.by(clock))


@dataclass(frozen=True)
class Ratio:
    """How many times as long one case took as another: the median over rounds, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f} to {self.high:.2f}]"


def measured(work: Callable[[], T]) -> tuple[T, Seconds]:
    """What `work` returns, and what it took."""
    _finish()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    _finish()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _finish() -> None:
    """A GPU computes on while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(cases: Mapping[str, Callable[[], T]], rounds: int, *, warm: bool = True) -> dict[str, Timed[T]]:
    """Every case once a round, every other round in reverse; `warm`: each once before, off the clock.

    Raises ValueError without a round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: at least 1 is needed, not {rounds}")
    for work in cases.values() if warm else ():
        work()
    results: dict[str, T] = {}
    times: dict[str, list[Seconds]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            results[name], seconds = measured(cases[name])
            times[name].append(seconds)
    return {name: Timed(results[name], tuple(times[name])) for name in cases}


def ratio(slow: Timed[T], fast: Timed[T], clock: Clock) -> Ratio:
    """Seconds of `slow` over those of `fast`, round by round."""
    each = [over / under for over, under in zip(slow.by(clock), fast.by(clock), strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))

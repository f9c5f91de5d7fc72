"""Interleaved timing, and ratios of paired rounds."""

import time
from collections.abc import Callable

import pytest

from benchmarks.timing import Ratio, Seconds, Timed, ratio, time_call, time_interleaved


def timed(*walls: float) -> Timed[None]:
    return Timed(None, tuple(Seconds(wall=wall, cpu=2 * wall * (1 + wall)) for wall in walls))


def noted(names: str, notes: list[str]) -> dict[str, Callable[[], int]]:
    """Cases that record when they run, and return the number of runs so far."""

    def case(name: str) -> Callable[[], int]:
        def work() -> int:
            notes.append(name)
            return len(notes)

        return work

    return {name: case(name) for name in names}


def test_cases_are_interleaved_in_alternating_order() -> None:
    notes: list[str] = []
    found = time_interleaved(noted("abc", notes), 3, warmup=False)
    assert "".join(notes) == "abc" + "cba" + "abc"
    assert {name: len(case.rounds) for name, case in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert {name: case.result for name, case in found.items()} == {"a": 7, "b": 8, "c": 9}


def test_warmup_is_not_timed() -> None:
    notes: list[str] = []
    found = time_interleaved(noted("ab", notes), 1)
    assert "".join(notes) == "ab" + "ab"
    assert all(len(case.rounds) == 1 for case in found.values())


def test_at_least_one_round_is_needed() -> None:
    with pytest.raises(ValueError, match="at least 1 is needed, not 0"):
        time_interleaved(noted("a", []), 0)


def test_sleeping_takes_wall_time_and_computing_takes_both() -> None:
    _, waited = time_call(lambda: time.sleep(0.05))
    total, worked = time_call(lambda: sum(range(3_000_000)))
    assert total == 3_000_000 * 2_999_999 // 2
    assert waited.wall >= 0.05
    assert waited.cpu < 0.02
    assert worked.cpu > waited.cpu
    assert worked.wall > 0.9 * worked.cpu


def test_a_ratio_pairs_rounds() -> None:
    """A machine that is three times as slow in one round does not change the ratio."""
    found = ratio(timed(2, 6, 8), timed(1, 3, 2), "wall")
    assert found == Ratio(median=2, low=2, high=4)
    assert str(found) == "2.00 [2.00 to 4.00]"


def test_each_clock_has_ratios_of_its_own() -> None:
    slow, fast = timed(1, 1, 3), timed(1, 2, 1)
    assert ratio(slow, fast, "wall") == Ratio(median=1, low=0.5, high=3)
    assert ratio(slow, fast, "cpu") == Ratio(median=1, low=4 / 12, high=24 / 4)
    assert slow.median("wall") == 1
    assert slow.median("cpu") == 4


def test_rounds_must_pair_up() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio(timed(1, 2), timed(1), "wall")

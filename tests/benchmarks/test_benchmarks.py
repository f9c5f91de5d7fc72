"""What the benchmarks measure with: cases in turn, and ratios of rounds that belong together."""

import time
from collections.abc import Callable

import pytest

from benchmarks.timing import Ratio, Seconds, Timed, interleaved, measured, ratio


def timed(*walls: float) -> Timed[None]:
    return Timed(None, tuple(Seconds(wall=wall, cpu=2 * wall * (1 + wall)) for wall in walls))


def noted(names: str, notes: list[str]) -> dict[str, Callable[[], int]]:
    """Cases that note when they run, and return how much has run by then."""

    def case(name: str) -> Callable[[], int]:
        def work() -> int:
            notes.append(name)
            return len(notes)

        return work

    return {name: case(name) for name in names}


def test_cases_take_turns_and_no_case_always_follows_another() -> None:
    notes: list[str] = []
    found = interleaved(noted("abc", notes), 3, warm=False)
    assert "".join(notes) == "abc" + "cba" + "abc"
    assert {name: len(case.rounds) for name, case in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert {name: case.result for name, case in found.items()} == {"a": 7, "b": 8, "c": 9}


def test_warming_up_is_off_the_clock() -> None:
    notes: list[str] = []
    found = interleaved(noted("ab", notes), 1)
    assert "".join(notes) == "ab" + "ab"
    assert all(len(case.rounds) == 1 for case in found.values())


def test_nothing_is_measured_in_no_round() -> None:
    with pytest.raises(ValueError, match="at least 1 is needed, not 0"):
        interleaved(noted("a", []), 0)


def test_waiting_costs_wall_time_and_computing_costs_both() -> None:
    _, waited = measured(lambda: time.sleep(0.05))
    total, worked = measured(lambda: sum(range(3_000_000)))
    assert total == 3_000_000 * 2_999_999 // 2
    assert waited.wall >= 0.05
    assert waited.cpu < 0.02
    assert worked.cpu > waited.cpu
    assert worked.wall > 0.9 * worked.cpu


def test_a_ratio_compares_rounds_that_belong_together() -> None:
    """A machine that is three times as slow in one round leaves no trace."""
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

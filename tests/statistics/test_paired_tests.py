"""Paired comparisons: McNemar against exact values, the bootstrap against data with a known difference."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from advmoe.runtime.machine import generator
from advmoe.statistics.paired_tests import PairedDifference, compare_paired, mcnemar_p_value


def verdicts(both: int, only_first: int, only_second: int, neither: int) -> tuple[Tensor, Tensor]:
    """Two classifiers on the same images."""
    groups = [(1, 1, both), (1, 0, only_first), (0, 1, only_second), (0, 0, neither)]
    rows = [(first, second) for first, second, count in groups for _ in range(count)]
    first_N, second_N = torch.tensor(rows, dtype=torch.bool).unbind(1)
    return first_N, second_N


@pytest.mark.parametrize("discordant", [0, 1, 2, 3, 7, 20, 51])
def test_mcnemar_is_the_exact_sign_test(discordant: int) -> None:
    for only_first in range(discordant + 1):
        expected = binomtest(only_first, discordant).pvalue if discordant else 1.0
        assert mcnemar_p_value(only_first, discordant - only_first) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("only_first", "only_second"), [(400, 600), (0, 900), (5200, 5000), (3000, 3000)])
def test_mcnemar_of_many_images_neither_underflows_nor_overflows(only_first: int, only_second: int) -> None:
    expected = binomtest(only_first, only_first + only_second).pvalue
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(expected, rel=1e-6)


def test_mcnemar_is_symmetric() -> None:
    assert mcnemar_p_value(3, 11) == mcnemar_p_value(11, 3)


def test_images_on_which_both_agree_do_not_count_for_mcnemar() -> None:
    few, many = compare_paired(*verdicts(2, 1, 9, 2), seed=0), compare_paired(*verdicts(2000, 1, 9, 500), seed=0)
    assert few.p == many.p == round(mcnemar_p_value(1, 9), 6)


def test_the_difference_is_first_minus_second() -> None:
    found = compare_paired(*verdicts(50, 30, 10, 10), seed=0)
    assert (found.difference, found.only_first, found.only_second) == (0.2, 30, 10)
    assert 0 < found.low < 0.2 < found.high
    assert found.p == round(binomtest(10, 40).pvalue, 6)
    second_N, first_N = verdicts(50, 30, 10, 10)
    swapped = compare_paired(first_N, second_N, seed=0)
    assert (swapped.difference, swapped.low, swapped.high) == (-0.2, -found.high, -found.low)


def test_the_same_classifier_does_not_differ_from_itself() -> None:
    first_N, _ = verdicts(30, 5, 0, 5)
    assert compare_paired(first_N, first_N, seed=0) == PairedDifference(0.0, 0.0, 0.0, 0, 0, 1.0)


def test_one_image_is_enough() -> None:
    assert compare_paired(torch.tensor([True]), torch.tensor([False]), seed=0) == PairedDifference(
        1.0, 1.0, 1.0, 1, 0, 1.0
    )


def test_the_interval_is_repeatable() -> None:
    first_N, second_N = verdicts(200, 31, 17, 52)
    found = compare_paired(first_N, second_N, seed=3)
    assert compare_paired(first_N, second_N, seed=3) == found
    another = compare_paired(first_N, second_N, seed=4)
    assert (another.low, another.high) != (found.low, found.high)
    assert another.low == pytest.approx(found.low, abs=0.01)  # the variation of the resampling is small


def test_the_interval_agrees_with_the_normal_one_for_many_images() -> None:
    first_N, second_N = verdicts(2000, 300, 200, 500)
    found = compare_paired(first_N, second_N, seed=0)
    change_N = first_N.double() - second_N.double()
    half = 1.96 * float(change_N.std()) / len(change_N) ** 0.5
    assert found.low == pytest.approx(found.difference - half, abs=0.002)
    assert found.high == pytest.approx(found.difference + half, abs=0.002)


def test_the_interval_is_narrower_than_that_of_unpaired_images() -> None:
    """Errors on the same images are correlated, which a paired interval uses."""
    found = compare_paired(*verdicts(500, 20, 10, 470), seed=0)
    unpaired = 2 * 1.96 * (2 * 0.25 / 1000) ** 0.5
    assert found.high - found.low < 0.4 * unpaired


def test_the_interval_has_its_nominal_coverage() -> None:
    stream, rounds, covered = generator("test_paired", "coverage"), 120, 0
    for seed in range(rounds):
        # right with probability 0.7 and 0.6 on an image; the truth is a difference of 0.1
        luck_N = torch.rand(150, generator=stream)
        found = compare_paired(luck_N < 0.7, (luck_N + 0.2 * torch.rand(150, generator=stream)) < 0.7, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.88 * rounds <= covered <= 0.99 * rounds


@pytest.mark.parametrize(("first", "second"), [(3, 4), (4, 3), (0, 0), (0, 3)])
def test_classifiers_on_other_images_are_not_paired(first: int, second: int) -> None:
    with pytest.raises(ValueError, match=f"cannot pair {first} with {second} images"):
        compare_paired(torch.ones(first, dtype=torch.bool), torch.ones(second, dtype=torch.bool), seed=0)


def test_a_comparison_can_be_written_as_json() -> None:
    found = compare_paired(*verdicts(3, 2, 1, 0), seed=0)
    assert set(found.as_dict()) == {"difference", "low", "high", "only_first", "only_second", "p"}
    assert PairedDifference(**found.as_dict()) == found

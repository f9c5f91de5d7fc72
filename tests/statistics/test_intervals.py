"""Wilson intervals against published values, and their properties."""

import pytest
import torch

from advmoe.statistics.intervals import Proportion, wilson_interval

KNOWN = [  # (correct, total, low, high); four digits of the score interval at 95 %
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (5, 10, 0.2366, 0.7634),
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
    (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I
    (0, 20, 0.0, 0.1611),  # Newcombe 1998, table I
    (1, 29, 0.0061, 0.1718),  # Newcombe 1998, table I
]


@pytest.mark.parametrize(("correct", "total", "low", "high"), KNOWN)
def test_wilson_gives_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("total", [1, 7, 180, 10_000])
def test_wilson_contains_the_proportion_and_stays_in_range(total: int) -> None:
    for correct in {0, 1, total // 3, total - 1, total}:
        low, high = wilson_interval(correct, total)
        assert low >= 0
        assert low <= correct / total + 1e-12  # rounding
        assert correct / total <= high + 1e-12
        assert high <= 1
        assert low < high


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (17, 180)])
def test_wilson_of_right_mirrors_wilson_of_wrong(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))


def test_more_images_make_the_interval_narrower() -> None:
    widths = [high - low for low, high in (wilson_interval(total // 2, total) for total in (10, 100, 1000, 10_000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / 100, rel=0.01)  # the normal one, where it is good


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 10), (11, 10), (1, 0)])
def test_wilson_refuses_invalid_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} of {total} is not a proportion"):
        wilson_interval(correct, total)


def test_a_proportion_counts_a_mask() -> None:
    share = Proportion.from_mask(torch.arange(10) < 5)
    assert (share.correct, share.total, share.accuracy) == (5, 10, 0.5)
    assert (share.low, share.high) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert share.as_dict() == {"correct": 5, "total": 10, "accuracy": 0.5, "low": share.low, "high": share.high}


def test_a_proportion_prints_percent_with_its_interval() -> None:
    assert str(Proportion.from_mask(torch.arange(10) < 5)) == "50.0 [23.7, 76.3]"


def test_a_proportion_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="0 of 0 is not a proportion"):
        Proportion.from_mask(torch.zeros(0, dtype=torch.bool))


def test_pooled_proportions_are_one_proportion_of_all_images() -> None:
    shares = [Proportion.from_counts(1, 1), Proportion.from_counts(0, 1), Proportion.from_counts(3, 8)]
    assert Proportion.pooled(shares) == Proportion.from_mask(torch.arange(10) < 4)  # not the mean of 1, 0 and 3/8
    assert Proportion.pooled(shares[:1]) == shares[0]


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 of 0 is not a proportion"):
        Proportion.pooled([])

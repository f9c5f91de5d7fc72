"""Tests whether the mean of one difference per seed is zero."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from scipy import stats

MIN_SEEDS = 3  # with two, the t-interval is thirteen times as wide as their standard deviation
CONFIDENCE = 0.95
DIGITS = 6
T_TEST, SIGN_TEST = "paired t-test", "exact sign test"


@dataclass(frozen=True)
class SeedTest:
    """`mean` and standard deviation `sd` of the differences, and the two-sided `p` of the `test`.

    `low`, `high`: the 95 % t-interval of the mean; None where all seeds have the same difference.
    """

    test: str
    mean: float
    sd: float
    low: float | None
    high: float | None
    p: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the test for JSON, rounded to six digits."""
        numbers = {"mean": self.mean, "sd": self.sd, "low": self.low, "high": self.high, "p": self.p}
        rounded = {name: None if value is None else round(value, DIGITS) for name, value in numbers.items()}
        return {"test": self.test, **rounded}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            every = f"every seed differs by {100 * self.mean:+.1f} points" if self.mean else "no seed differs"
            return f"{every}, so there is no scatter for a t-test; {self.test}"
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"difference {100 * self.mean:+.1f} points {interval}, sd {100 * self.sd:.1f}, {self.test}"


def mean_difference_test(differences: Sequence[Fraction]) -> SeedTest:
    """Tests whether the mean difference of at least three seeds is 0.

    Paired t-test with its interval (Student 1908). If all differences are equal, their variance is 0 and t is
    undefined; a p-value of 0 would only reflect the coarse steps of an accuracy. The exact sign test is used instead:
    p = 2 / 2**n, below 0.05 from six seeds. Fractions, because floats make equal differences unequal.
    """
    count = len(differences)
    assert count >= MIN_SEEDS, "too few seeds for a test"
    values = [float(difference) for difference in differences]
    mean = math.fsum(values) / count
    if len(set(differences)) == 1:
        return SeedTest(SIGN_TEST, values[0], 0.0, None, None, 2 / 2**count if values[0] else 1.0)
    result = stats.ttest_1samp(values, 0.0)  # of the differences: the paired test of the accuracies
    low, high = result.confidence_interval(CONFIDENCE)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return SeedTest(T_TEST, mean, sd, float(low), float(high), float(result.pvalue))

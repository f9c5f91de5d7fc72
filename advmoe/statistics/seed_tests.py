"""From one number a seed to what may be said of a method: the mean, how it scatters, and a test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from scipy import stats

LEAST = 3  # seeds; two would give a t-interval thirteen times as wide as their scatter
CONFIDENCE = 0.95
DIGITS = 6
T_TEST, SIGN_TEST = "paired t-test", "exact sign test"


@dataclass(frozen=True)
class SeedTest:
    """`low`, `high`: 95 % t-interval of the mean difference; None where the seeds do not scatter. `p`: two-sided."""

    test: str
    mean: float
    sd: float
    low: float | None
    high: float | None
    p: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {"mean": self.mean, "sd": self.sd, "low": self.low, "high": self.high, "p": self.p}
        rounded = {name: None if value is None else round(value, DIGITS) for name, value in numbers.items()}
        return {"test": self.test, **rounded}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            every = f"every seed differs by {100 * self.mean:+.1f} points" if self.mean else "no seed differs"
            return f"{every}, so there is no scatter for a t-test; {self.test}"
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"difference {100 * self.mean:+.1f} points {interval}, sd {100 * self.sd:.1f}, {self.test}"


def over_seeds(differences: Sequence[Fraction]) -> SeedTest:
    """Test whether the mean of at least three seeds' differences is 0.

    Paired t-test with its interval (Student 1908). When all seeds differ by exactly the same, their variance is 0 and
    there is no t: a p-value of 0 would take the coarse steps in which an accuracy moves for certainty. Then the exact
    sign test takes over, which asks only how often chance gives one sign to all: 2 / 2**n, below 0.05 from six seeds.
    Fractions, because floats make equal differences look unequal.
    """
    count = len(differences)
    assert count >= LEAST, "too few seeds for a test"
    values = [float(difference) for difference in differences]
    mean = math.fsum(values) / count
    if len(set(differences)) == 1:
        return SeedTest(SIGN_TEST, values[0], 0.0, None, None, 2 / 2**count if values[0] else 1.0)
    found = stats.ttest_1samp(values, 0.0)  # of the differences: the paired test of the accuracies
    low, high = found.confidence_interval(CONFIDENCE)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return SeedTest(T_TEST, mean, sd, float(low), float(high), float(found.pvalue))

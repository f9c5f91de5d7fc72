"""How numbers and names are written in the report."""

from collections.abc import Mapping
from typing import Any

from advmoe.core.settings import format_epsilon
from advmoe.evaluation.summary import BASELINE, JOINT, MEANING, MIXTURE, PRETRAINED, WITHHELD

ABSENT = "-"  # what was not measured
NOT_HERE = "not recorded here"
NBSP = "\N{NO-BREAK SPACE}"
UNITS = ("", "thousand", "million", "billion", "trillion", "quadrillion")


def model_name(name: str) -> str:
    """A model of the evaluation in words: `baseline/trades` -> `trades`."""
    if name.startswith(PRETRAINED):
        return f"expert {name.removeprefix(PRETRAINED)}, pre-trained"
    if name.startswith(JOINT):
        return f"expert {name.removeprefix(JOINT)}, in the mixture"
    return MEANING.get(name, name.removeprefix(BASELINE))


def percent(share: float) -> str:
    """A share in per cent, without the sign."""
    return f"{100 * share:.1f}"


def interval(share: Mapping[str, Any] | None) -> str:
    """A share with its 95 % interval, in per cent; None: a failed check forbids to print it."""
    if share is None:
        return WITHHELD
    # an interval is not torn apart at the end of a line
    return f"{percent(share['accuracy'])} [{percent(share['low'])},{NBSP}{percent(share['high'])}]"


def difference(paired: Mapping[str, Any]) -> str:
    """A paired difference in points, with its interval."""
    points = (100 * paired[key] for key in ("difference", "low", "high"))
    return f"{{:+.1f}} [{{:+.1f}},{NBSP}{{:+.1f}}]".format(*points)


def p_value(value: float) -> str:
    """A p-value; what rounds to 0 is only known to be small."""
    return f"<{NBSP}0.001" if value < 0.001 else f"{value:.3f}"


def radius(epsilon: float) -> str:
    """An epsilon as a share and in pixel levels."""
    return f"{epsilon:g} ({format_epsilon(epsilon)})"


def count(value: float) -> str:
    """A count with thin groups of three digits: 12 345."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def large(value: float) -> str:
    """A large count in three digits and a word: 12.3 million."""
    power = 0
    while abs(value) >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}".strip()


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory(size: float) -> str:
    """Bytes in MiB."""
    return f"{count(size / 2**20)} MiB"


def is_mixture(name: str) -> bool:
    """Whether a model of the evaluation is the mixture itself."""
    return name == MIXTURE

"""Formats numbers and names for the report."""

from collections.abc import Mapping
from typing import Any

from advmoe.core.settings import format_epsilon
from advmoe.evaluation.summary import BASELINE, DISPLAY_NAMES, JOINT, MIXTURE, PRETRAINED, WITHHELD

ABSENT = "-"  # not measured
NOT_RECORDED = "not recorded"
NBSP = "\N{NO-BREAK SPACE}"
UNITS = ("", "thousand", "million", "billion", "trillion", "quadrillion")


def model_name(name: str) -> str:
    """Returns the display name of a model of the evaluation: `baseline/trades` -> `trades`."""
    if name.startswith(PRETRAINED):
        return f"expert {name.removeprefix(PRETRAINED)}, pre-trained"
    if name.startswith(JOINT):
        return f"expert {name.removeprefix(JOINT)}, in the mixture"
    return DISPLAY_NAMES.get(name, name.removeprefix(BASELINE))


def percent(value: float) -> str:
    """Formats a proportion in per cent, without the sign."""
    return f"{100 * value:.1f}"


def interval(proportion: Mapping[str, Any] | None) -> str:
    """Formats a proportion with its 95 % interval, in per cent. None: withheld after a failed check."""
    if proportion is None:
        return WITHHELD
    # non-breaking space: no line break inside an interval
    return f"{percent(proportion['accuracy'])} [{percent(proportion['low'])},{NBSP}{percent(proportion['high'])}]"


def difference(paired: Mapping[str, Any]) -> str:
    """Formats a paired difference in percentage points, with its interval."""
    points = (100 * paired[key] for key in ("difference", "low", "high"))
    return f"{{:+.1f}} [{{:+.1f}},{NBSP}{{:+.1f}}]".format(*points)


def p_value(value: float) -> str:
    """Formats a p-value with three digits."""
    return f"<{NBSP}0.001" if value < 0.001 else f"{value:.3f}"


def radius(epsilon: float) -> str:
    """Formats an epsilon as a fraction of the pixel range and in pixel levels."""
    return f"{epsilon:g} ({format_epsilon(epsilon)})"


def count(value: float) -> str:
    """Formats a count with thin spaces between groups of three digits: 12 345."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def large_number(value: float) -> str:
    """Formats a large count with three digits and a unit: 12.3 million."""
    power = 0
    while abs(value) >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}".strip()


def duration(seconds: float) -> str:
    """Formats seconds in s, min or h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory(size: float) -> str:
    """Formats bytes in MiB."""
    return f"{count(size / 2**20)} MiB"


def is_mixture(name: str) -> bool:
    """Whether a model of the evaluation is the mixture."""
    return name == MIXTURE

"""The figures of the report: interval plots, line plots and bubble charts, drawn with matplotlib."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import MaxNLocator

from advmoe.reporting.report.document import Figure
from advmoe.reporting.report.formats import large_number, percent
from advmoe.reporting.report.svg import BACKGROUND, SERIES, TEXT, settings, to_svg
from advmoe.statistics.intervals import Proportion

WIDTH = 5.8  # inches; narrow, so that the labels are legible on a phone
MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # not distinguished by colour alone
DASHES = ("-", "--", ":", "-.")
BASELINE_COLOURS = len(SERIES) - 1
LEGEND_CHARACTERS, MARKER_CHARACTERS = (
    66,
    8,
)  # characters in a row of a legend, and the width of a marker in characters
MAX_AREA, MIN_AREA = 960.0, 16.0  # square points, of a bubble
MAX_POINTS = 240  # of a line; more cannot be distinguished on a page


@dataclass(frozen=True)
class IntervalPoint:
    """A value with its interval and a `reference` value, drawn hollow. `series` 0 is the mixture."""

    label: str
    value: float
    low: float
    high: float
    reference: float | None = None
    series: int = 1


@dataclass(frozen=True)
class Line:
    """A line through points, with optional error bars `bounds` (low and high of every point).

    `series` 0 is the mixture; `dash` distinguishes lines of one colour. `steps`: the value is constant until the next
    point.
    """

    label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    series: int
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    steps: bool = False
    dash: int = 0


@dataclass(frozen=True)
class Bubble:
    """A point with intervals in x and y, drawn as a bubble whose area is proportional to `size` >= 0."""

    label: str
    x: Proportion
    y: Proportion
    size: float
    series: int


def html_id(text: str) -> str:
    """Returns a name with characters that an HTML id forbids replaced by hyphens."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)


def assign_colours(names: Iterable[str], known: Sequence[str]) -> dict[str, int]:
    """Assigns a series to every name; `known` networks, the mixture first, have the same series in every figure."""
    distinct = list(dict.fromkeys(names))
    others = [name for name in distinct if name not in known]
    series = {name: index for index, name in enumerate([*known, *others])}
    return {name: series[name] for name in distinct}


def interval_plot(
    name: str,
    title: str,
    description: str,
    rows: Sequence[IntervalPoint],
    *,
    axis: str,
    meaning: Mapping[str, str],
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws values with their intervals, one row each, the first on top. `meaning`: legend of `filled` and `hollow`."""
    with settings():
        canvas = MatplotlibFigure(figsize=(WIDTH, 0.75 + 0.34 * len(rows)))
        axes = canvas.subplots()
        for position, row in enumerate(rows):
            _draw_interval(axes, position, row)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(axis)
        if limits:
            axes.set_xlim(*limits)
        _legend(canvas, axes, meaning)
        text = f"{description} {_describe(rows)}"
        return Figure(title, text, to_svg(canvas, name, title, text))


def _draw_interval(axes: Axes, position: int, row: IntervalPoint) -> None:
    colour = _colour(row.series)
    axes.plot([row.low, row.high], [position, position], color=colour, linewidth=2.4 if row.series == 0 else 1.6)
    axes.plot(row.value, position, "o", color=colour, markersize=8 if row.series == 0 else 6)
    if row.reference is not None:
        axes.plot(row.reference, position, "o", markersize=6, markerfacecolor=BACKGROUND, markeredgecolor=colour)


def _legend(canvas: MatplotlibFigure, axes: Axes, meaning: Mapping[str, str]) -> None:
    faces = {"filled": TEXT, "hollow": BACKGROUND}
    for kind, text in meaning.items():
        axes.plot([], [], "o", markersize=6, markeredgecolor=TEXT, markerfacecolor=faces[kind], label=text)
    if meaning:
        canvas.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.0)


def _describe(rows: Sequence[IntervalPoint]) -> str:
    return "; ".join(f"{row.label} {row.value:g} [{row.low:g}, {row.high:g}]" for row in rows) + "."


def line_plot(
    name: str,
    title: str,
    description: str,
    series: Sequence[Line],
    *,
    axes_labels: tuple[str, str],
    limits: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Draws lines over a common axis. `limits`: of the y axis; `mark`: a position on the x axis and its label."""
    with settings():
        canvas = MatplotlibFigure(figsize=(WIDTH, 3.4))
        axes = canvas.subplots()
        if mark:
            axes.axvline(mark[0], color=TEXT, linewidth=0.8, linestyle=":", label=mark[1])
        for each in sorted(series, key=lambda line: -line.series):  # the mixture on top of all others
            _draw_line(axes, each)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        if limits:
            axes.set_ylim(*limits)
        if all(at == int(at) for line in series for at in line.xs):  # epochs and queries are integers
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: _rank(labels[index], series))
        canvas.legend(
            [handles[index] for index in order],
            [labels[index] for index in order],
            loc="outside upper left",
            ncols=max(1, min(4, LEGEND_CHARACTERS // (MARKER_CHARACTERS + max(map(len, labels))))),
            handletextpad=0.5,
        )
        return Figure(title, description, to_svg(canvas, name, title, description))


def bubble_chart(
    name: str, title: str, description: str, rows: Sequence[Bubble], *, axes_labels: tuple[str, str], unit: str
) -> Figure:
    """Draws a bubble chart; areas are proportional to the sizes, but at least a sixtieth of the largest.

    `unit`: of the sizes.
    """
    largest = max((row.size for row in rows), default=0.0) or 1.0
    labels = [f"{row.label}: {large_number(row.size)} {unit}" for row in rows]
    columns = max(1, min(3, LEGEND_CHARACTERS // (MARKER_CHARACTERS + max(map(len, labels), default=0))))
    with settings():
        canvas = MatplotlibFigure(figsize=(WIDTH, 3.4 + 0.19 * -(-len(rows) // columns)))
        axes = canvas.subplots()
        for row in sorted(rows, key=lambda row: -row.size):  # small ones on top of large ones
            colour, marker = _colour(row.series), MARKERS[row.series % len(MARKERS)]
            (x, *across), (y, *along) = _percent(row.x), _percent(row.y)
            axes.plot(across, [y, y], color=colour, linewidth=0.8)
            axes.plot([x, x], along, color=colour, linewidth=0.8)
            # always a circle: for other markers matplotlib's size is not the area
            area = max(MIN_AREA, MAX_AREA * row.size / largest)
            axes.scatter(x, y, s=area, color=colour, alpha=0.35, linewidths=0)
            axes.plot(x, y, marker, color=colour, markersize=5)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        for row, label in zip(rows, labels, strict=True):
            axes.plot([], [], MARKERS[row.series % len(MARKERS)], color=_colour(row.series), markersize=6, label=label)
        canvas.legend(loc="outside upper left", ncols=columns, handletextpad=0.3)
        points = (
            f"{row.label} {percent(row.x.accuracy)} and {percent(row.y.accuracy)} at {large_number(row.size)} {unit}"
            for row in rows
        )
        text = f"{description} {'; '.join(points)}."
        return Figure(title, text, to_svg(canvas, name, title, text))


def _percent(share: Proportion) -> tuple[float, float, float]:
    return 100 * share.accuracy, 100 * share.low, 100 * share.high


def _rank(label: str, series: Sequence[Line]) -> int:
    return next((each.series for each in series if each.label == label), len(series) + 1)


def _colour(series: int) -> str:
    """Returns the colour of a series: the first is reserved for the mixture, the others are cycled."""
    return SERIES[0] if series == 0 else SERIES[1 + (series - 1) % BASELINE_COLOURS]


def _draw_line(axes: Axes, line: Line) -> None:
    step = max(1, len(line.xs) // MAX_POINTS)
    drawn = [index for index in range(len(line.xs)) if index % step == 0 or index == len(line.xs) - 1]
    xs, ys = ([values[index] for index in drawn] for values in (line.xs, line.ys))
    dash = max(0, line.series - 1) // BASELINE_COLOURS + line.dash
    style: dict[str, Any] = {
        "color": _colour(line.series),
        "linestyle": DASHES[dash % len(DASHES)],
        "linewidth": 2.6 if line.series == 0 else 1.6,
        "label": line.label,
    }
    if line.steps:
        axes.step(xs, ys, where="post", **style)
        return
    axes.plot(xs, ys, marker=MARKERS[(line.series + line.dash) % len(MARKERS)], markersize=5, **style)
    if line.bounds:
        low, high = ([values[index] for index in drawn] for values in line.bounds)
        axes.vlines(xs, low, high, colors=style["color"], linewidth=1)

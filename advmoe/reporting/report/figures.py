"""The three kinds of figures of the report: values with their intervals, lines, and discs between two values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

from advmoe.reporting.report.document import Figure
from advmoe.reporting.report.formats import large, percent
from advmoe.reporting.report.svg import INK, SERIES, SURFACE, settings, to_svg
from advmoe.statistics.intervals import Share

WIDTH = 5.8  # inches; narrow, so that its letters can be read on a phone
MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # colour alone tells nothing to some readers
DASHES = ("-", "--", ":", "-.")
OTHERS = len(SERIES) - 1
ROOM, KEY = 66, 8  # letters beside each other in a legend, and what the sign before each label takes of them
LARGEST, SMALLEST = 960.0, 16.0  # square points, of a disc
THINNED = 240  # points of a line; more cannot be told apart on a page


@dataclass(frozen=True)
class Dot:
    """A value with its interval; `other`, drawn hollow, is what it is compared with. `series` 0 is the mixture."""

    label: str
    value: float
    low: float
    high: float
    other: float | None = None
    series: int = 1


@dataclass(frozen=True)
class Line:
    """A line through points; with `bounds`, low and high at every point, as whiskers.

    `series` 0 is the mixture; `dash` tells lines of one colour apart. `stairs`: the value holds until the next point.
    """

    label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    series: int
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    stairs: bool = False
    dash: int = 0


@dataclass(frozen=True)
class Disc:
    """A point between two values with both intervals, as large as `size`, which is not negative."""

    label: str
    x: Share
    y: Share
    size: float
    series: int


def anchor(text: str) -> str:
    """A name that may stand in an id; the names that params.yaml allows stay as they are."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)


def colours(names: Iterable[str], known: Sequence[str]) -> dict[str, int]:
    """A series for every name; `known` networks, the mixture first, have the same one in every figure."""
    wanted = list(dict.fromkeys(names))
    others = [name for name in wanted if name not in known]
    order = {name: place for place, name in enumerate([*known, *others])}
    return {name: order[name] for name in wanted}


def dots(
    name: str,
    title: str,
    description: str,
    rows: Sequence[Dot],
    *,
    axis: str,
    meaning: Mapping[str, str],
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Values with their intervals, one row each, the first on top. `meaning`: what `filled` and `hollow` stand for."""
    with settings():
        drawing = Drawing(figsize=(WIDTH, 0.75 + 0.34 * len(rows)))
        axes = drawing.subplots()
        for place, row in enumerate(rows):
            _dot(axes, place, row)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(axis)
        if limits:
            axes.set_xlim(*limits)
        _key(drawing, axes, meaning)
        said = f"{description} {_spoken(rows)}"
        return Figure(title, said, to_svg(drawing, name, title, said))


def _dot(axes: Axes, place: int, row: Dot) -> None:
    colour = _colour(row.series)
    axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.4 if row.series == 0 else 1.6)
    axes.plot(row.value, place, "o", color=colour, markersize=8 if row.series == 0 else 6)
    if row.other is not None:
        axes.plot(row.other, place, "o", markersize=6, markerfacecolor=SURFACE, markeredgecolor=colour)


def _key(drawing: Drawing, axes: Axes, meaning: Mapping[str, str]) -> None:
    faces = {"filled": INK, "hollow": SURFACE}
    for kind, text in meaning.items():
        axes.plot([], [], "o", markersize=6, markeredgecolor=INK, markerfacecolor=faces[kind], label=text)
    if meaning:
        drawing.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.0)


def _spoken(rows: Sequence[Dot]) -> str:
    return "; ".join(f"{row.label} {row.value:g} [{row.low:g}, {row.high:g}]" for row in rows) + "."


def lines(
    name: str,
    title: str,
    description: str,
    series: Sequence[Line],
    *,
    axes_labels: tuple[str, str],
    limits: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Lines over a common axis. `limits` of the values; `mark`: a place on the horizontal axis worth a word."""
    with settings():
        drawing = Drawing(figsize=(WIDTH, 3.4))
        axes = drawing.subplots()
        if mark:
            axes.axvline(mark[0], color=INK, linewidth=0.8, linestyle=":", label=mark[1])
        for each in sorted(series, key=lambda line: -line.series):  # the mixture on top of all others
            _line(axes, each)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        if limits:
            axes.set_ylim(*limits)
        if all(at == int(at) for line in series for at in line.xs):  # epochs and queries are counted
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: _rank(labels[place], series))
        drawing.legend(
            [handles[place] for place in order],
            [labels[place] for place in order],
            loc="outside upper left",
            ncols=max(1, min(4, ROOM // (KEY + max(map(len, labels))))),
            handletextpad=0.5,
        )
        return Figure(title, description, to_svg(drawing, name, title, description))


def discs(
    name: str, title: str, description: str, rows: Sequence[Disc], *, axes_labels: tuple[str, str], unit: str
) -> Figure:
    """Points between two values, in discs whose areas are as the sizes; those under a sixtieth of the largest are drawn
    as that, or they could not be seen. `unit`: what a size is.
    """
    largest = max((row.size for row in rows), default=0.0) or 1.0
    labels = [f"{row.label}: {large(row.size)} {unit}" for row in rows]
    beside = max(1, min(3, ROOM // (KEY + max(map(len, labels), default=0))))
    with settings():
        drawing = Drawing(figsize=(WIDTH, 3.4 + 0.19 * -(-len(rows) // beside)))
        axes = drawing.subplots()
        for row in sorted(rows, key=lambda row: -row.size):  # small ones on top of large ones
            colour, marker = _colour(row.series), MARKERS[row.series % len(MARKERS)]
            (x, *across), (y, *along) = _percent(row.x), _percent(row.y)
            axes.plot(across, [y, y], color=colour, linewidth=0.8)
            axes.plot([x, x], along, color=colour, linewidth=0.8)
            # always a circle: of other signs matplotlib's size is the frame, not the area
            area = max(SMALLEST, LARGEST * row.size / largest)
            axes.scatter(x, y, s=area, color=colour, alpha=0.35, linewidths=0)
            axes.plot(x, y, marker, color=colour, markersize=5)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        for row, label in zip(rows, labels, strict=True):
            axes.plot([], [], MARKERS[row.series % len(MARKERS)], color=_colour(row.series), markersize=6, label=label)
        drawing.legend(loc="outside upper left", ncols=beside, handletextpad=0.3)
        points = (
            f"{row.label} {percent(row.x.accuracy)} and {percent(row.y.accuracy)} at {large(row.size)} {unit}"
            for row in rows
        )
        said = f"{description} {'; '.join(points)}."
        return Figure(title, said, to_svg(drawing, name, title, said))


def _percent(share: Share) -> tuple[float, float, float]:
    return 100 * share.accuracy, 100 * share.low, 100 * share.high


def _rank(label: str, series: Sequence[Line]) -> int:
    return next((each.series for each in series if each.label == label), len(series) + 1)


def _colour(series: int) -> str:
    """The first colour is the mixture's alone; the others take turns."""
    return SERIES[0] if series == 0 else SERIES[1 + (series - 1) % OTHERS]


def _line(axes: Axes, line: Line) -> None:
    step = max(1, len(line.xs) // THINNED)
    drawn = [place for place in range(len(line.xs)) if place % step == 0 or place == len(line.xs) - 1]
    xs, ys = ([values[place] for place in drawn] for values in (line.xs, line.ys))
    turn = max(0, line.series - 1) // OTHERS + line.dash
    style: dict[str, Any] = {
        "color": _colour(line.series),
        "linestyle": DASHES[turn % len(DASHES)],
        "linewidth": 2.6 if line.series == 0 else 1.6,
        "label": line.label,
    }
    if line.stairs:
        axes.step(xs, ys, where="post", **style)
        return
    axes.plot(xs, ys, marker=MARKERS[(line.series + line.dash) % len(MARKERS)], markersize=5, **style)
    if line.bounds:
        low, high = ([values[place] for place in drawn] for values in line.bounds)
        axes.vlines(xs, low, high, colors=style["color"], linewidth=1)

"""Console output: messages, progress bars and tables.

On a terminal rich draws bars and tables; elsewhere (a log, DVC's output in CI) progress is a line every few seconds.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120  # columns of a table in a log
out = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
PLAIN_INTERVAL = 10.0  # seconds between lines of progress in a log
_process_name: list[str] = []  # prefix of error messages, where several processes write to one console

T = TypeVar("T")


def use_plain_output() -> None:
    """Switches to log output: several processes cannot share a progress bar."""
    out.no_color = True
    out._force_terminal = False


def mute(name: str) -> None:
    """Silences this process, except for `error`, whose messages then start with `name`."""
    out.quiet = err.quiet = True
    _process_name.append(f"{name}: ")


def error(text: str) -> None:
    """Prints an error message to standard error, even after `mute`."""
    err.quiet = False
    err.print("".join(_process_name) + text, style="red", markup=False)


def info(text: str) -> None:
    """Prints a line, without interpreting rich markup."""
    out.print(text, markup=False)


def warn(text: str) -> None:
    """Prints a warning to standard error."""
    err.print(f"warning: {text}", style="yellow", markup=False)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yields `items` and shows the progress through them."""
    if out.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=out, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
        return
    shown = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - shown >= PLAIN_INTERVAL:
            shown = time.monotonic()
            info(f"{description}: {count}/{total}")


class Progress:
    """A progress bar for steps of unequal length, with a remark and the estimated remaining time."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = self.shown = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=out, transient=True) if out.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task(self.description, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, steps: int, remark: str) -> None:
        """Adds `steps` completed steps and shows `remark`."""
        self.done += steps
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=steps, description=f"{self.description} ({remark})")
        elif time.monotonic() - self.shown >= PLAIN_INTERVAL:
            self.shown = time.monotonic()
            remaining = (self.shown - self.started) / self.done * (self.total - self.done)
            info(f"{self.description}: {self.done}/{self.total}, {remark}, about {remaining:.0f} s left")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table with a left-aligned first column of text and right-aligned columns of numbers."""
    grid = Table(title=Text(title), title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        grid.add_column(Text(column), justify="right" if position else "left")
    for row in rows:
        grid.add_row(*map(Text, row))
    out.print(grid)


def text_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table of left-aligned text; long cells are wrapped."""
    grid = Table(title=Text(title), title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(Text(column), overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    out.print(grid, soft_wrap=False)

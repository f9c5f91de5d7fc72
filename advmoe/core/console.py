"""What a person sees: one progress display, one table style. Nothing here can change a result.

On a terminal: rich bars and tables. Anywhere else (a log, DVC's output in CI): plain lines, one every few seconds.
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

PLAIN_WIDTH = 120  # of tables in a log
out = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
PLAIN_SECONDS = 10.0
_NAME: list[str] = []  # of this process, where several share the screen

T = TypeVar("T")


def plain() -> None:
    """From here on write as to a log: several processes cannot share a progress bar."""
    out.no_color = True
    out._force_terminal = False


def mute(name: str) -> None:
    """From here on another process does the talking; of what ends it this one still speaks, as `name`."""
    out.quiet = err.quiet = True
    _NAME.append(f"{name}: ")


def fail(text: str) -> None:
    """Print the sentence that ends this process to standard error."""
    err.quiet = False
    err.print("".join(_NAME) + text, style="red", markup=False)


def say(text: str) -> None:
    """Print a line for the user, markup off: names and paths are data."""
    out.print(text, markup=False)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    err.print(f"warning: {text}", style="yellow", markup=False)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items` while showing how far they are."""
    if out.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=out, transient=True) as progress:
            yield from progress.track(items, total=total, description=what)
        return
    shown = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            say(f"{what}: {count}/{total}")


class Progress:
    """Progress of long work in uneven pieces: done of total, a remark, and how long it will still take."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.started = self.shown = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=out, transient=True) if out.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task(self.what, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, pieces: int, remark: str) -> None:
        """`pieces` more are done."""
        self.done += pieces
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=pieces, description=f"{self.what} ({remark})")
        elif time.monotonic() - self.shown >= PLAIN_SECONDS:
            self.shown = time.monotonic()
            left = (self.shown - self.started) / self.done * (self.total - self.done)
            say(f"{self.what}: {self.done}/{self.total}, {remark}, about {left:.0f} s left")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned text, the others are right-aligned numbers."""
    grid = Table(title=Text(title), title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        grid.add_column(Text(column), justify="right" if position else "left")
    for row in rows:
        grid.add_row(*map(Text, row))
    out.print(grid)


def listing(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of text: everything left-aligned, long cells wrapped."""
    grid = Table(title=Text(title), title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(Text(column), overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    out.print(grid, soft_wrap=False)

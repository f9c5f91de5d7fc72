"""The elements of a report: sections of paragraphs, tables, figures and pictures.

All texts are plain text, which the renderers escape. Only `Figure.svg` is markup, from `advmoe.reporting.report.svg`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TONES = {"pass": "good", "warn": "mixed", "fail": "bad", "supported": "good", "contradicted": "bad", "withheld": "bad"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `heat` in [0, 1] shades it; `status`, such as `pass`, sets its colour."""

    text: str
    heat: float | None = None
    status: str = ""

    def __post_init__(self) -> None:
        """Raises TypeError for values of a wrong type, which malformed files may contain."""
        if not (
            isinstance(self.text, str) and isinstance(self.status, str) and isinstance(self.heat, float | int | None)
        ):
            raise TypeError(f"a table cannot show {self}")

    @property
    def tone(self) -> str:
        """The colour of the status: `good`, `mixed`, `bad` or an empty string."""
        return TONES.get(self.status, "")


@dataclass(frozen=True)
class Row:
    """A row of a table; its first cell is the row heading. `emphasis` marks the mixture."""

    cells: tuple[Cell, ...]
    emphasis: bool = False


@dataclass(frozen=True)
class Table:
    """A table with caption and column headings; every row has one cell per column."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: str = "table"

    @property
    def is_heat_map(self) -> bool:
        """Whether any cell has a `heat`."""
        return any(cell.heat is not None for each in self.rows for cell in each.cells)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `alert` highlights it."""

    text: str
    alert: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True)
class Link:
    """A hyperlink; nothing is loaded from it."""

    text: str
    address: str
    kind: str = "link"


@dataclass(frozen=True)
class Figure:
    """A vector graphic. `description` is its text alternative."""

    title: str
    description: str
    svg: str
    kind: str = "figure"


@dataclass(frozen=True)
class Picture:
    """A raster image as a data URI. `pixelated`: enlarged without smoothing."""

    title: str
    description: str
    uri: str
    pixelated: bool = False
    kind: str = "picture"


@dataclass(frozen=True)
class Example:
    """A test image under attack: pictures, predicted classes and gate weights."""

    title: str
    misclassified: bool
    pictures: tuple[Picture, ...]
    facts: tuple[tuple[str, str], ...]
    weights: Table
    kind: str = "example"


@dataclass(frozen=True)
class Gallery:
    """A grid of examples."""

    examples: tuple[Example, ...]
    kind: str = "gallery"


@dataclass(frozen=True)
class CodeBlock:
    """Preformatted text, such as a file or a command."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Details:
    """Collapsible blocks under a title."""

    title: str
    blocks: tuple["Block", ...]
    kind: str = "details"


Block = Table | Paragraph | Link | Figure | Picture | Gallery | CodeBlock | Details


@dataclass(frozen=True)
class Section:
    """A section of the report. `name` is its anchor; `in_markdown`: whether the Markdown report includes it."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    in_markdown: bool = False


def row(cells: Iterable[str | Cell], *, emphasis: bool = False) -> Row:
    """Creates a row from texts and cells."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), emphasis)


def table(caption: str, columns: Sequence[str], rows: Iterable[Row]) -> Table:
    """Creates a table. Every row must have as many cells as there are columns."""
    result = Table(caption, tuple(columns), tuple(rows))
    assert all(len(each.cells) == len(columns) for each in result.rows), caption
    return result


def missing_results(what: str, hint: str) -> tuple[Block, ...]:
    """Returns the text of a section without results: what is missing, and a hint how to produce it."""
    return (Paragraph(f"{what}: no results; {hint}."),)

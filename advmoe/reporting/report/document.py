"""What a report is made of: sections of paragraphs, tables, figures and pictures, each in plain words.

All texts are plain text; renderers escape them. Only `Figure.svg` is markup, made by `advmoe.reporting.report.svg`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORDS = {"pass": "good", "warn": "mixed", "fail": "bad", "supported": "good", "contradicted": "bad", "withheld": "bad"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `heat` in [0, 1] tints it; `status` is a word such as `pass` that decides its colour."""

    text: str
    heat: float | None = None
    status: str = ""

    def __post_init__(self) -> None:
        """Raises TypeError for what cannot be shown: cells are filled from records, which may be spoilt."""
        if not (
            isinstance(self.text, str) and isinstance(self.status, str) and isinstance(self.heat, float | int | None)
        ):
            raise TypeError(f"a table cannot show {self}")

    @property
    def tone(self) -> str:
        """`good`, `mixed`, `bad` or nothing: the colour of the status."""
        return WORDS.get(self.status, "")


@dataclass(frozen=True)
class Row:
    """A row of a table; its first cell is its heading. `emphasis`: the mixture's."""

    cells: tuple[Cell, ...]
    emphasis: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption and column headings; all rows have as many cells as there are columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: str = "table"

    @property
    def heated(self) -> bool:
        """Whether it is a heat map."""
        return any(cell.heat is not None for each in self.rows for cell in each.cells)


@dataclass(frozen=True)
class Paragraph:
    """Text. `loud` for what must not be overlooked."""

    text: str
    loud: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True)
class Link:
    """A plain link that a reader may follow; nothing is loaded from it."""

    text: str
    address: str
    kind: str = "link"


@dataclass(frozen=True)
class Figure:
    """A drawing. `description` says in words what can be seen."""

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
    """A test image and what became of it: its pictures, what was seen in them, and the gate's weights."""

    title: str
    fell: bool
    pictures: tuple[Picture, ...]
    facts: tuple[tuple[str, str], ...]
    weights: Table
    kind: str = "example"


@dataclass(frozen=True)
class Gallery:
    """Examples side by side."""

    examples: tuple[Example, ...]
    kind: str = "gallery"


@dataclass(frozen=True)
class Listing:
    """Text to be shown letter by letter, such as a file or a command."""

    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class Folded:
    """Blocks that are long, behind their title."""

    title: str
    blocks: tuple["Block", ...]
    kind: str = "folded"


Block = Table | Paragraph | Link | Figure | Picture | Gallery | Listing | Folded


@dataclass(frozen=True)
class Section:
    """A part of the report. `name` is its anchor; a `brief` one stands in the Markdown too."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    brief: bool = False


def row(cells: Iterable[str | Cell], *, emphasis: bool = False) -> Row:
    """A row of texts and cells."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), emphasis)


def table(caption: str, columns: Sequence[str], rows: Iterable[Row]) -> Table:
    """A table; rows that do not fit the columns are a mistake of ours."""
    found = Table(caption, tuple(columns), tuple(rows))
    assert all(len(each.cells) == len(columns) for each in found.rows), caption
    return found


def missing(what: str, how: str) -> tuple[Block, ...]:
    """The one sentence of a section whose stage has not run."""
    return (Paragraph(f"{what}: not in this record; {how}."),)

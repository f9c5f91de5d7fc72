"""Reads and writes the decisions of a model on every image, from which all claims are computed.

metrics/decisions/<slug>.csv, one row per image: `index` is its position in the source, `label` its class, then `clean`,
each attack and `worst`: 1 correct, 0 wrong, empty if the image was not attacked. This module does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.snapshots import Snapshot, read_csv

FOLDER = paths.METRICS / "decisions"
INDEX, LABEL = "index", "label"
CLEAN, WORST = "clean", "worst"  # columns: accuracy without an attack, and the worst case over all attacks
CORRECT, WRONG, NOT_ATTACKED = "1", "0", ""
MAX_DIGITS = 18  # of an integer
CELL_VALUES = {CORRECT: True, WRONG: False, NOT_ATTACKED: None}

Correct = tuple[bool | None, ...]


def slug(name: str) -> str:
    """Returns the name of a model as part of a file name."""
    return name.replace("/", "-")


def path(name: str) -> Path:
    """Returns the path of the decisions of a model."""
    return FOLDER / f"{slug(name)}.csv"


def rows(
    index: Sequence[int], labels: Sequence[int], correct: Mapping[str, Sequence[int]]
) -> list[dict[str, int | str]]:
    """Returns the rows of a decision file, one per image, for `files.write_csv`.

    `correct` maps `clean`, each attack and `worst` to 1 (correct) or 0 (wrong) per image; a column that is shorter than
    `index` leaves the remaining images empty.
    """
    columns: dict[str, list[Any]] = {INDEX: list(index), LABEL: list(labels)}
    for kind, cells in correct.items():
        columns[kind] = [*cells, *[NOT_ATTACKED] * (len(index) - len(cells))]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Decisions:
    """The decisions of one model: `index` and `labels` of its images, and for each column whether they are correct.

    The columns of `correct` are `clean`, each attack and `worst`. None: the image was not attacked.
    """

    model: str
    index: tuple[int, ...]
    labels: tuple[int, ...]
    correct: Mapping[str, Correct]

    @classmethod
    def read(cls, snapshot: Snapshot, model: str) -> "Decisions":
        """Reads the decisions of a model. Raises MissingFileError when it is missing, UserError when it is invalid."""
        file = path(model)
        where = f"{snapshot.name}: {file}"
        table = read_csv(snapshot, file)
        if not table:
            raise UserError(f"{where} has no rows")
        head = list(table[0])
        if head[:3] != [INDEX, LABEL, CLEAN] or head[3:][-1:] != [WORST]:
            raise UserError(f"{where} must have the columns {INDEX}, {LABEL}, {CLEAN}, attacks, {WORST}")
        index, labels = (_parse_integers([row[name] for row in table], f"{where}, {name}") for name in (INDEX, LABEL))
        if len(set(index)) < len(index):
            raise UserError(f"{where} has two rows for image {next(one for one in index if index.count(one) > 1)}")
        correct = {kind: _parse_correct([row[kind] for row in table], f"{where}, {kind}") for kind in head[2:]}
        _check_worst(correct, where)
        return cls(model, index, labels, correct)

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks, in the order of the columns."""
        return tuple(kind for kind in self.correct if kind not in {CLEAN, WORST})

    def same_images(self, other: "Decisions") -> bool:
        """Whether both hold the same images in the same order."""
        return (self.index, self.labels) == (other.index, other.labels)


def _parse_integers(cells: list[str], where: str) -> tuple[int, ...]:
    for row, cell in enumerate(cells, start=2):
        if not (cell.isascii() and cell.isdecimal() and len(cell) <= MAX_DIGITS):
            raise UserError(f"{where}: row {row} must be a non-negative integer, not {cell!r}")
    return tuple(map(int, cells))


def _parse_correct(cells: list[str], where: str) -> Correct:
    for row, cell in enumerate(cells, start=2):
        if cell not in CELL_VALUES:
            raise UserError(f"{where}: row {row} must be 1, 0 or empty, not {cell!r}")
    return tuple(CELL_VALUES[cell] for cell in cells)


def _check_worst(correct: Mapping[str, Correct], where: str) -> None:
    """Raises UserError when the column `worst` does not follow from the other columns."""
    *others, worst = correct.values()
    for row, (stated, *each) in enumerate(zip(worst, *others, strict=True), start=2):
        if each[0] is None or stated is not all(cell is not False for cell in each):
            raise UserError(f"{where}: row {row} says {WORST} {stated}, which does not follow from its other cells")

"""Decisions image by image, small enough for git: what every claim is computed from, and can be computed from again.

metrics/decisions/<slug>.csv, one row an image: `index` is its position in the source, `label` its class, then `clean`,
each attack and `worst`: 1 right, 0 wrong, empty when the image was not to meet the attack. Reading needs no torch.
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
RIGHT, WRONG, NOT_MET = "1", "0", ""
LONGEST_NUMBER = 18  # digits of a position
MEANING = {RIGHT: True, WRONG: False, NOT_MET: None}

Correct = tuple[bool | None, ...]


def slug(name: str) -> str:
    """The name of a model as part of a file name."""
    return name.replace("/", "-")


def path(name: str) -> Path:
    """Where the decisions of a model lie."""
    return FOLDER / f"{slug(name)}.csv"


def rows(
    index: Sequence[int], labels: Sequence[int], correct: Mapping[str, Sequence[int]]
) -> list[dict[str, int | str]]:
    """Rows of a decision file, one per image, for `files.write_csv`.

    `correct` maps `clean`, each attack and `worst` to 1 (correct) or 0 (wrong) per image; a column that is shorter than
    `index` leaves the remaining images empty.
    """
    columns: dict[str, list[Any]] = {INDEX: list(index), LABEL: list(labels)}
    for kind, cells in correct.items():
        columns[kind] = [*cells, *[NOT_MET] * (len(index) - len(cells))]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Decisions:
    """Of one model: positions and labels of its images and, under `clean`, each attack and `worst`, who was right.

    None stands for an image that was not to meet the attack.
    """

    model: str
    index: tuple[int, ...]
    labels: tuple[int, ...]
    correct: Mapping[str, Correct]

    @classmethod
    def read(cls, record: Snapshot, model: str) -> "Decisions":
        """From a record. Raises AbsentError when it has none of this model, UserError when they cannot be true."""
        file = path(model)
        where = f"{record.name}: {file}"
        table = read_csv(record, file)
        if not table:
            raise UserError(f"{where} decides on no image")
        head = list(table[0])
        if head[:3] != [INDEX, LABEL, CLEAN] or head[3:][-1:] != [WORST]:
            raise UserError(f"{where} must have the columns {INDEX}, {LABEL}, {CLEAN}, attacks, {WORST}")
        index, labels = (_whole([row[name] for row in table], f"{where}, {name}") for name in (INDEX, LABEL))
        if len(set(index)) < len(index):
            raise UserError(f"{where} decides twice on image {next(one for one in index if index.count(one) > 1)}")
        correct = {kind: _correct([row[kind] for row in table], f"{where}, {kind}") for kind in head[2:]}
        _check_worst(correct, where)
        return cls(model, index, labels, correct)

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks that were met, in order."""
        return tuple(kind for kind in self.correct if kind not in {CLEAN, WORST})

    def same_images(self, other: "Decisions") -> bool:
        """Whether both are about the same images in the same order."""
        return (self.index, self.labels) == (other.index, other.labels)


def _whole(cells: list[str], where: str) -> tuple[int, ...]:
    for row, cell in enumerate(cells, start=2):
        if not (cell.isascii() and cell.isdecimal() and len(cell) <= LONGEST_NUMBER):
            raise UserError(f"{where}: row {row} must be a whole number, not {cell!r}")
    return tuple(map(int, cells))


def _correct(cells: list[str], where: str) -> Correct:
    for row, cell in enumerate(cells, start=2):
        if cell not in MEANING:
            raise UserError(f"{where}: row {row} must be 1, 0 or empty, not {cell!r}")
    return tuple(MEANING[cell] for cell in cells)


def _check_worst(correct: Mapping[str, Correct], where: str) -> None:
    """The worst case follows from the other columns; a file in which it does not was not written by an evaluation."""
    *others, worst = correct.values()
    for row, (stated, *each) in enumerate(zip(worst, *others, strict=True), start=2):
        if each[0] is None or stated is not all(cell is not False for cell in each):
            raise UserError(f"{where}: row {row} says {WORST} {stated}, which does not follow from its other cells")

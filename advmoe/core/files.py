"""One way to write a file: whole or not at all."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advmoe.core.errors import UserError, first_line


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one, never a part.

    Missing parent folders are made. Raises UserError when the disk is full or the folder cannot be written.
    """
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False
        ) as handle:
            partial = Path(handle.name)
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.chmod(0o644)  # NamedTemporaryFile makes private files; results are for sharing
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror or error}); nothing was changed") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; the order of keys is kept."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that share their keys as CSV with a header line, atomically."""
    assert rows, "a table without rows has no columns"
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `make repro` builds it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


@contextmanager
def as_written(where: object) -> Iterator[None]:
    """Take apart, inside the block, what advmoe wrote to a file earlier; `where` names it.

    Raises UserError when a key, a type or a number there is not what was written: files can be edited and damaged.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: not as this version of advmoe writes it ({first_line(error)})") from error


def names(values: Iterable[object]) -> str:
    """Join values for a sentence: 'a, b, c'."""
    return ", ".join(str(value) for value in values)

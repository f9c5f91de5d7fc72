"""Atomic writes of bytes, text, JSON and CSV, and reading of JSON."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advmoe.core.errors import UserError, error_summary


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically: readers see either the old or the new file.

    Creates missing parent folders. Raises UserError when the disk is full or the folder is not writable.
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
        partial.chmod(0o644)  # NamedTemporaryFile creates files that only the owner can read
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror or error}); nothing was changed") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_folder(folder: Path, contents: Mapping[str, str]) -> None:
    """Write text files by their path inside `folder`, each atomically, and remove all other files there."""
    for path in [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []:
        if path.relative_to(folder).as_posix() not in contents:
            path.unlink()
    for name, text in contents.items():
        write_text(folder / name, text)


def canonical_json(value: Any) -> str:
    """Returns JSON with sorted keys and without spaces: equal values give equal bytes. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically, with the keys in their order. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same keys as CSV with a header line, atomically."""
    assert rows, "the columns are taken from the first row"
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError when it is missing or malformed."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `make repro` builds it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


@contextmanager
def report_malformed(source: object) -> Iterator[None]:
    """Context manager for parsing a file that advmoe wrote, named by `source`.

    Raises UserError for the exceptions that a missing key, a wrong type or an invalid number causes in the block.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: not in the format of this version of advmoe ({error_summary(error)})") from error


def join_names(values: Iterable[object]) -> str:
    """Returns the values separated by commas, such as 'a, b, c'."""
    return ", ".join(str(value) for value in values)

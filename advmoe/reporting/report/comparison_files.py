"""Writes the comparison of two experiments: an HTML page and Markdown beside it."""

import re
from collections.abc import Sequence
from pathlib import Path

from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.snapshots import open_snapshot
from advmoe.reporting.report.compare import MOVED, compare, markdown
from advmoe.reporting.report.html import render_comparison


def compare_and_write(names: Sequence[str], folder: Path = paths.COMPARISONS) -> Path:
    """Compare two folders, revisions or DVC experiments by name; the path of the page, with Markdown beside it.

    Raises UserError as `open_snapshot` and `compare` do, and for any other number of names.
    """
    if len(names) != 2:
        raise UserError(f"a comparison is of two experiments, but {len(names)} are named: {files.names(names)}")
    found = compare(*map(open_snapshot, names))
    page = folder / f"{_file_name(found.left)}--{_file_name(found.right)}.html"
    files.write_text(page, render_comparison(found))
    files.write_text(page.with_suffix(".md"), markdown(found))
    moved = sum(row[-1] == MOVED for row in found.accuracy.rows)
    console.say(
        f"{len(found.params.rows)} changes in params.yaml; {moved} of {len(found.accuracy.rows)} accuracies moved"
    )
    console.say(f"written to {page}, and as Markdown beside it")
    return page


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "record"

"""Writes the comparison of two runs as HTML and Markdown."""

import re
from collections.abc import Sequence
from pathlib import Path

from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.snapshots import open_snapshot
from advmoe.reporting.report.compare import SIGNIFICANT, compare_snapshots, to_markdown
from advmoe.reporting.report.html import render_comparison


def compare_and_write(names: Sequence[str], folder: Path = paths.COMPARISONS) -> Path:
    """Compares two folders, git revisions or DVC experiments; returns the path of the HTML page.

    Raises UserError as `open_snapshot` and `compare_snapshots` do, and unless there are two names.
    """
    if len(names) != 2:
        raise UserError(f"a comparison needs two experiments, got {len(names)}: {files.join_names(names)}")
    comparison = compare_snapshots(*map(open_snapshot, names))
    page = folder / f"{_file_name(comparison.left)}--{_file_name(comparison.right)}.html"
    files.write_text(page, render_comparison(comparison))
    files.write_text(page.with_suffix(".md"), to_markdown(comparison))
    significant = sum(row[-1] == SIGNIFICANT for row in comparison.accuracy.rows)
    total = len(comparison.accuracy.rows)
    console.info(
        f"{len(comparison.params.rows)} parameters changed; {significant} of {total} differences are significant"
    )
    console.info(f"written to {page} and {page.with_suffix('.md')}")
    return page


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "snapshot"

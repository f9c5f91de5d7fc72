"""Writes the files of the report."""

from pathlib import Path

from advmoe.core import artifacts, files, paths
from advmoe.core.snapshots import CURRENT_FOLDER, Snapshot
from advmoe.reporting.report import gallery
from advmoe.reporting.report.content import build_content
from advmoe.reporting.report.html import render_html
from advmoe.reporting.report.markdown import render_markdown

HTML, MARKDOWN = "report.html", "report.md"


def write_report(snapshot: Snapshot, folder: Path, examples: int, root: Path = CURRENT_FOLDER) -> tuple[Path, Path]:
    """Writes report.html and report.md to `folder` and returns their paths.

    The gallery shows `examples` images of the artifacts under `root`, if they belong to the snapshot. Raises UserError
    for files of another schema, and when `folder` cannot be written.
    """
    mixture = root / paths.MIXTURE
    header = artifacts.load(mixture).header if mixture.is_file() else None
    content = build_content(snapshot, lambda sources: gallery.section(sources, root, examples), header)
    page, text = render_html(content), render_markdown(content)  # render both before writing either
    files.write_text(folder / HTML, page)
    files.write_text(folder / MARKDOWN, text)
    return folder / HTML, folder / MARKDOWN

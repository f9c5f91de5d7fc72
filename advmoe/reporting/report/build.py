"""The report's files."""

from pathlib import Path

from advmoe.core import artifacts, files, paths
from advmoe.core.snapshots import HERE, Snapshot
from advmoe.reporting.report import gallery
from advmoe.reporting.report.content import gather
from advmoe.reporting.report.html import render_html
from advmoe.reporting.report.markdown import render_markdown

HTML, MARKDOWN = "report.html", "report.md"


def build(record: Snapshot, folder: Path, examples: int, root: Path = HERE) -> tuple[Path, Path]:
    """Write report.html and report.md into `folder`; returns their paths.

    The gallery shows `examples` images of the artifacts under `root`, if they are those of the record. Raises
    UserError for a record of another schema, and when `folder` cannot be written.
    """
    mixture = root / paths.MIXTURE
    header = artifacts.load(mixture).header if mixture.is_file() else None
    content = gather(record, lambda sources: gallery.section(sources, root, examples), header)
    page, text = render_html(content), render_markdown(content)  # both or none
    files.write_text(folder / HTML, page)
    files.write_text(folder / MARKDOWN, text)
    return folder / HTML, folder / MARKDOWN

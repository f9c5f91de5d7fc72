"""Renders the report as Markdown, short enough for a pull request."""

import html
import re
from collections.abc import Callable, Iterable

from advmoe.core.files import report_malformed
from advmoe.reporting.report.content import ReportContent
from advmoe.reporting.report.document import Block, Details, Link, Paragraph, Row, Section, Table
from advmoe.reporting.report.overview import Headline

SPECIAL = re.compile(r"([\\`*_\[\]~])")
ENTITIES = {"|": "&#124;", "@": "&#64;", "\n": " ", "\r": " "}  # a bar would end a cell, an @ would mention a user


def escape(text: str) -> str:
    """Escapes text for a paragraph or a table cell of GitHub Markdown."""
    safe = SPECIAL.sub(r"\\\1", html.escape(text, quote=False))
    for character, entity in ENTITIES.items():
        safe = safe.replace(character, entity)
    return safe


def fenced(text: str, language: str) -> str:
    """Returns a fenced code block, with a fence longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def render_markdown(content: ReportContent) -> str:
    """Renders verdict, headline, claims and the sections for Markdown; figures and code blocks are left out.

    Raises UserError when a name is not a string.
    """
    with report_malformed(content.snapshot_name):
        return _render(content)


def _render(content: ReportContent) -> str:
    parts = [
        f"# {escape(content.title)}",
        escape(f"{content.subject}; source: {content.snapshot_name}"),
        *_headline(content.headline),
    ]
    for section in content.sections:
        if section.in_markdown:
            parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _headline(headline: Headline) -> Iterable[str]:
    yield f"**Verdict of the checks: {escape(headline.verdict)}.** {escape(headline.meaning)}"
    if headline.number:
        number = f"**{headline.number} %** (95 % interval {headline.interval})"
        yield f"{number} {escape(headline.caption)}. Clean: {escape(headline.clean)}."
    if headline.reasons:
        yield "\n".join(f"- withheld: {escape(reason)}" for reason in headline.reasons)
    if headline.claims:
        yield _table(headline.claims_table)
    yield from map(escape, headline.notes)


def _section(section: Section) -> list[str]:
    return [f"## {escape(section.title)}", *blocks(section.blocks)]


def blocks(content: Iterable[Block]) -> list[str]:
    """Renders blocks as Markdown; figures, pictures and code blocks are left out."""
    return [text for block in content if (text := _block(block))]


def _block(block: Block) -> str:
    kind = type(block)
    return RENDERERS[kind](block) if kind in RENDERERS else ""


def _paragraph(block: Paragraph) -> str:
    return f"**{escape(block.text)}**" if block.alert else escape(block.text)


def _table(block: Table) -> str:
    rows = [_cells(each) for each in block.rows]
    return f"{escape(block.caption)}:\n\n{_grid([escape(each) for each in block.columns], rows)}"


def _cells(row: Row) -> list[str]:
    texts = [escape(cell.text) for cell in row.cells]
    return [f"**{texts[0]}**", *texts[1:]] if row.emphasis else texts


def _grid(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _details(block: Details) -> str:
    inside = "\n\n".join(blocks(block.blocks))
    title = html.escape(block.title)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>" if inside else ""


def _link(block: Link) -> str:
    return f"[{escape(block.text)}]({block.address})"


RENDERERS: dict[type, Callable[..., str]] = {
    Paragraph: _paragraph,
    Table: _table,
    Details: _details,
    Link: _link,
}

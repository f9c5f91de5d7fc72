"""The report as Markdown, short enough for a pull request."""

import html
import re
from collections.abc import Callable, Iterable

from advmoe.core.files import as_written
from advmoe.reporting.report.content import Content
from advmoe.reporting.report.document import Block, Folded, Link, Paragraph, Row, Section, Table
from advmoe.reporting.report.overview import Head

SPECIAL = re.compile(r"([\\`*_\[\]~])")
ENTITIES = {"|": "&#124;", "@": "&#64;", "\n": " ", "\r": " "}  # a bar would end a cell, an @ call somebody


def escape(text: str) -> str:
    """Text that GitHub shows as it is, in a paragraph or in the cell of a table."""
    safe = SPECIAL.sub(r"\\\1", html.escape(text, quote=False))
    for character, entity in ENTITIES.items():
        safe = safe.replace(character, entity)
    return safe


def fenced(text: str, language: str) -> str:
    """Text letter by letter, behind a fence that nothing inside it can end."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def render_markdown(content: Content) -> str:
    """Verdict, headline, findings and the brief sections; figures and listings are left to the page.

    Raises UserError for words of a record that are no words.
    """
    with as_written(content.record):
        return _whole(content)


def _whole(content: Content) -> str:
    parts = [
        f"# {escape(content.title)}",
        escape(f"{content.subject}; read from: {content.record}"),
        *_head(content.head),
    ]
    for section in content.sections:
        if section.brief:
            parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _head(head: Head) -> Iterable[str]:
    yield f"**Verdict of the checks: {escape(head.verdict)}.** {escape(head.meaning)}"
    if head.number:
        number = f"**{head.number} %** (95 % interval {head.interval})"
        yield f"{number} {escape(head.caption)}. Clean: {escape(head.clean)}."
    if head.reasons:
        yield "\n".join(f"- withheld: {escape(reason)}" for reason in head.reasons)
    if head.findings:
        yield _table(head.evidence)
    yield from map(escape, head.notes)


def _section(section: Section) -> list[str]:
    return [f"## {escape(section.title)}", *blocks(section.blocks)]


def blocks(found: Iterable[Block]) -> list[str]:
    """Each block as Markdown; figures, pictures and listings are left out."""
    return [text for block in found if (text := _block(block))]


def _block(block: Block) -> str:
    kind = type(block)
    return RENDERERS[kind](block) if kind in RENDERERS else ""


def _paragraph(block: Paragraph) -> str:
    return f"**{escape(block.text)}**" if block.loud else escape(block.text)


def _table(block: Table) -> str:
    rows = [_cells(each) for each in block.rows]
    return f"{escape(block.caption)}:\n\n{_grid([escape(each) for each in block.columns], rows)}"


def _cells(row: Row) -> list[str]:
    texts = [escape(cell.text) for cell in row.cells]
    return [f"**{texts[0]}**", *texts[1:]] if row.emphasis else texts


def _grid(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(block: Folded) -> str:
    inside = "\n\n".join(blocks(block.blocks))
    title = html.escape(block.title)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>" if inside else ""


def _link(block: Link) -> str:
    return f"[{escape(block.text)}]({block.address})"


RENDERERS: dict[type, Callable[..., str]] = {
    Paragraph: _paragraph,
    Table: _table,
    Folded: _folded,
    Link: _link,
}

"""The report, and a comparison of two experiments, as HTML pages that need nothing but themselves."""

from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from advmoe.core.files import as_written
from advmoe.reporting.report.compare import Comparison
from advmoe.reporting.report.compare import Table as Compared
from advmoe.reporting.report.content import Content
from advmoe.reporting.report.document import Paragraph, Section, row, table


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates of this folder. Everything is escaped; only drawings come as markup."""
    found = Environment(
        loader=PackageLoader("advmoe.reporting.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["drawing"] = Markup  # made by advmoe.reporting.report.svg, which escapes names itself
    return found


def palette() -> str:
    """CSS of the colours, light and dark, for a drawing that stands alone."""
    return environment().get_template("palette.css").render()


def render_html(content: Content) -> str:
    """The page: no script, no request to anywhere. Raises UserError for words of a record that are no words."""
    with as_written(content.record):
        return environment().get_template("report.html.j2").render(content=content) + "\n"


def render_comparison(comparison: Comparison) -> str:
    """Two experiments side by side, as a page of the same kind."""
    sections = [_compared(place, each) for place, each in enumerate(comparison.tables)]
    page = environment().get_template("compare.html.j2").render(comparison=comparison, sections=sections)
    return page + "\n"


def _compared(place: int, found: Compared) -> Section:
    rows = [row(cells) for cells in found.rows]
    block = table(found.title, found.columns, rows) if rows else Paragraph(found.none)
    return Section(f"part-{place}", found.title, (block,))

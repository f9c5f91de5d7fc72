"""Renders the report and the comparison of two runs as self-contained HTML pages."""

from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from advmoe.core.files import report_malformed
from advmoe.reporting.report.compare import Comparison, ComparisonTable
from advmoe.reporting.report.content import ReportContent
from advmoe.reporting.report.document import Paragraph, Section, row, table


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Returns the Jinja environment. All texts are escaped; only figures are inserted as markup."""
    templates = Environment(
        loader=PackageLoader("advmoe.reporting.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["figure"] = Markup  # advmoe.reporting.report.svg has escaped the names
    return templates


def palette() -> str:
    """Returns the CSS of the light and dark colours, for a figure outside the report."""
    return environment().get_template("palette.css").render()


def render_html(content: ReportContent) -> str:
    """Renders the report, without scripts or external requests. Raises UserError when a name is not a string."""
    with report_malformed(content.snapshot_name):
        return environment().get_template("report.html.j2").render(content=content) + "\n"


def render_comparison(comparison: Comparison) -> str:
    """Renders the comparison of two runs."""
    sections = [_comparison_section(number, each) for number, each in enumerate(comparison.tables)]
    page = environment().get_template("compare.html.j2").render(comparison=comparison, sections=sections)
    return page + "\n"


def _comparison_section(number: int, compared: ComparisonTable) -> Section:
    rows = [row(cells) for cells in compared.rows]
    block = table(compared.title, compared.columns, rows) if rows else Paragraph(compared.empty_text)
    return Section(f"part-{number}", compared.title, (block,))

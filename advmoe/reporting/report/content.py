"""Builds the content of a report from a snapshot."""

from collections.abc import Callable
from dataclasses import dataclass

from advmoe.core.artifacts import Header
from advmoe.core.files import report_malformed
from advmoe.core.snapshots import Snapshot
from advmoe.reporting.report import checks, overview, paper_comparison, provenance, robustness, threats, training
from advmoe.reporting.report.document import Section
from advmoe.reporting.report.overview import Headline
from advmoe.reporting.report.sources import Sources

TITLE = "Robustness report: mixture of experts"


@dataclass(frozen=True)
class ReportContent:
    """A report before rendering. `subject`: data set, epsilon and seed; `snapshot_name`: the source of the results."""

    title: str
    subject: str
    snapshot_name: str
    headline: Headline
    sections: tuple[Section, ...]


GallerySection = Callable[[Sources], Section]


def build_content(
    snapshot: Snapshot, gallery: GallerySection | None = None, header: Header | None = None
) -> ReportContent:
    """Builds the content from the files of a snapshot.

    `gallery` builds the section of examples, which needs artifacts; `header`: of the mixture's artifact, if available.
    Sections without results say so. Raises UserError for files that are malformed or of another schema.
    """
    with report_malformed(snapshot.name):
        return _build(Sources(snapshot), gallery, header)


def _build(sources: Sources, gallery: GallerySection | None, header: Header | None) -> ReportContent:
    sections = [
        overview.section(sources),
        robustness.epsilon_section(sources),
        robustness.attacks_section(sources),
        robustness.gate_section(sources),
        *([gallery(sources)] if gallery else []),
        training.training_section(sources),
        threats.poisoning_section(sources),
        threats.extraction_section(sources),
        threats.membership_section(sources),
        training.cost_section(sources),
        checks.section(sources),
        paper_comparison.section(sources),
        provenance.section(sources, header),
    ]
    return ReportContent(TITLE, subject(sources), sources.snapshot.name, overview.headline(sources), tuple(sections))


def subject(sources: Sources) -> str:
    """Returns data set, epsilon and seed on one line."""
    params = sources.params
    source = params.get("prepare", {}).get("source", {})
    parts = [
        f"data: {source['kind']}" if "kind" in source else "",
        f"L-inf epsilon {params['epsilon']}" if "epsilon" in params else "",
        f"seed {params['seed']}" if "seed" in params else "",
    ]
    return ", ".join(filter(None, parts)) or "no params.yaml"

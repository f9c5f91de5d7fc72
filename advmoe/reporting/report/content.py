"""All that a report says, gathered from a record."""

from collections.abc import Callable
from dataclasses import dataclass

from advmoe.core.artifacts import Header
from advmoe.core.files import as_written
from advmoe.core.snapshots import Snapshot
from advmoe.reporting.report import checks, overview, paper_comparison, provenance, robustness, threats, training
from advmoe.reporting.report.document import Section
from advmoe.reporting.report.overview import Head
from advmoe.reporting.report.sources import Sources

TITLE = "How robust is this mixture of experts?"


@dataclass(frozen=True)
class Content:
    """A report before it is rendered. `record`: what it was read from; `subject`: data set, epsilon and seed."""

    title: str
    subject: str
    record: str
    head: Head
    sections: tuple[Section, ...]


Gallery = Callable[[Sources], Section]


def gather(record: Snapshot, gallery: Gallery | None = None, header: Header | None = None) -> Content:
    """Read everything a report needs. `gallery` makes the section of examples, which needs more than the record;
    `header`: of the mixture's artifact, where it is at hand.

    What did not run is said in a sentence. Raises UserError for files of another schema and for broken ones.
    """
    with as_written(record.name):
        return _gathered(Sources(record), gallery, header)


def _gathered(sources: Sources, gallery: Gallery | None, header: Header | None) -> Content:
    found = [
        overview.section(sources),
        robustness.over_epsilon(sources),
        robustness.matrix(sources),
        robustness.gate(sources),
        *([gallery(sources)] if gallery else []),
        training.curves(sources),
        threats.poisoning(sources),
        threats.extraction(sources),
        threats.membership(sources),
        training.cost(sources),
        checks.section(sources),
        paper_comparison.section(sources),
        provenance.section(sources, header),
    ]
    return Content(TITLE, subject(sources), sources.record.name, overview.head(sources), tuple(found))


def subject(sources: Sources) -> str:
    """What the run was about, in a line."""
    params = sources.params
    source = params.get("prepare", {}).get("source", {})
    parts = [
        f"data: {source['kind']}" if "kind" in source else "",
        f"L-inf epsilon {params['epsilon']}" if "epsilon" in params else "",
        f"seed {params['seed']}" if "seed" in params else "",
    ]
    return ", ".join(filter(None, parts)) or "no params.yaml in this record"

"""report: everything that is on record, for people: one HTML page, Markdown, and a card beside the mixture.

Reads all of params.yaml, metrics/ and plots/, the mixture and the adversarial images. Writes metrics/findings.json,
artifacts/report/report.html and report.md, and artifacts/train/mixture.md.
"""

from pathlib import Path

from advmoe.core import artifacts, console, files, paths
from advmoe.core.settings import Seed, load_section
from advmoe.core.snapshots import HERE, Folder
from advmoe.reporting.config import ReportSection
from advmoe.reporting.report.build import build
from advmoe.reporting.report.model_card import card
from advmoe.statistics import claims


def run() -> Path:
    """Judge the claims, then write the report and the card of what is on record; returns the page."""
    section, record = load_section("report", ReportSection), Folder(HERE)
    findings = claims.judge(record, section.claims, load_section("seed", Seed))
    files.write_json(paths.FINDINGS, findings.as_dict())
    written = build(record, paths.REPORT, examples=section.gallery)
    files.write_text(paths.CARD, card(record, artifacts.load(paths.MIXTURE).header))
    claims.show(findings)
    console.say(f"written to {files.names(written)} and {paths.CARD}")
    return written[0]

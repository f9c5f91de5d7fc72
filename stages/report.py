"""Stage `report`: tests the claims and writes the HTML report, the Markdown report and the model card.

Reads all of params.yaml, metrics/ and plots/, the mixture and the adversarial images. Writes metrics/findings.json,
metrics/threats.json (DVC metrics), artifacts/report/report.html and report.md, and artifacts/train/mixture.md.
"""

from pathlib import Path

from advmoe.core import artifacts, console, files, paths
from advmoe.core.settings import Seed, load_section
from advmoe.core.snapshots import CURRENT_FOLDER, FolderSnapshot
from advmoe.reporting.config import ReportSection
from advmoe.reporting.headline import threat_headline
from advmoe.reporting.report.build import write_report
from advmoe.reporting.report.model_card import render_model_card
from advmoe.statistics import claims


def run() -> Path:
    """Tests the claims, then writes report and model card; returns the path of the HTML page."""
    section, snapshot = load_section("report", ReportSection), FolderSnapshot(CURRENT_FOLDER)
    results = claims.evaluate_claims(snapshot, section.claims, load_section("seed", Seed))
    files.write_json(paths.FINDINGS, results.as_dict())
    files.write_json(paths.THREATS, threat_headline(snapshot))
    written = write_report(snapshot, paths.REPORT, examples=section.gallery)
    files.write_text(paths.MODEL_CARD, render_model_card(snapshot, artifacts.load(paths.MIXTURE).header))
    claims.show(results)
    console.info(f"written to {files.join_names(written)} and {paths.MODEL_CARD}")
    return written[0]

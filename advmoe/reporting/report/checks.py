"""What the ten checks say of every judged model, with their evidence."""

import json
from collections.abc import Mapping
from typing import Any

from advmoe.reporting.report import glossary
from advmoe.reporting.report.document import Block, Cell, Folded, Listing, Section, Table, missing, row, table
from advmoe.reporting.report.formats import ABSENT, is_mixture, model_name
from advmoe.reporting.report.sources import Sources


def section(sources: Sources) -> Section:
    """One overview of all models, then sentences and evidence for each."""
    title = "May these numbers be believed?"
    if not sources.verdicts:
        return Section("checks", title, missing("The checks", "`dvc repro evaluate` asks them"), brief=True)
    blocks: list[Block] = [
        _overview(sources.verdicts),
        Folded("What the checks look for", (_legend(sources.verdicts),)),
    ]
    blocks += [_model(name, verdict) for name, verdict in sources.verdicts.items()]
    return Section("checks", title, tuple(blocks), brief=True)


def _asked(verdicts: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(each["check"] for verdict in verdicts.values() for each in verdict["checks"]))


def _legend(verdicts: Mapping[str, Any]) -> Table:
    rows = [row([name, glossary.CHECKS.get(name, ABSENT)]) for name in _asked(verdicts)]
    return table("Each check passes if this holds", ["check", "what must hold"], rows)


def _overview(verdicts: Mapping[str, Any]) -> Table:
    names = _asked(verdicts)
    rows = []
    for name, verdict in verdicts.items():
        said = {each["check"]: each["status"] for each in verdict["checks"]}
        cells = [Cell(said.get(check, ABSENT), status=said.get(check, "")) for check in names]
        overall = Cell(verdict["verdict"], status=verdict["verdict"])
        rows.append(row([model_name(name), overall, *cells], emphasis=is_mixture(name)))
    return table(
        "Checks of every judged model; one that fails withholds its robust accuracy", ["model", "verdict", *names], rows
    )


def _model(name: str, verdict: Mapping[str, Any]) -> Folded:
    sentences = table(
        f"{model_name(name)}: what each check found",
        ["check", "status", "sentence"],
        [
            row([f"{place}. {each['check']}", Cell(each["status"], status=each["status"]), each["sentence"]])
            for place, each in enumerate(verdict["checks"], start=1)
        ],
    )
    evidence = {each["check"]: each["evidence"] for each in verdict["checks"]}
    return Folded(f"{model_name(name)}: sentences and evidence", (sentences, Listing(json.dumps(evidence, indent=2))))

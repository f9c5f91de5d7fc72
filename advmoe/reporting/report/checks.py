"""The section on the ten checks of the evaluation, with their evidence."""

import json
from collections.abc import Mapping
from typing import Any

from advmoe.evaluation.verdict import TITLES
from advmoe.reporting.report import glossary
from advmoe.reporting.report.document import (
    Block,
    Cell,
    CodeBlock,
    Details,
    Section,
    Table,
    missing_results,
    row,
    table,
)
from advmoe.reporting.report.formats import ABSENT, is_mixture, model_name
from advmoe.reporting.report.sources import Sources


def section(sources: Sources) -> Section:
    """An overview of all models, then the results and evidence of each."""
    title = "Checks"
    if not sources.verdicts:
        return Section("checks", title, missing_results("Checks", "`dvc repro evaluate` runs them"), in_markdown=True)
    blocks: list[Block] = [
        _overview(sources.verdicts),
        Details("What each check tests", (_legend(sources.verdicts),)),
    ]
    blocks += [_model(name, verdict) for name, verdict in sources.verdicts.items()]
    return Section("checks", title, tuple(blocks), in_markdown=True)


def _check_ids(verdicts: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(each["check"] for verdict in verdicts.values() for each in verdict["checks"]))


def _title(check: str) -> str:
    return TITLES.get(check, check)


def _legend(verdicts: Mapping[str, Any]) -> Table:
    rows = [row([_title(check), glossary.CHECKS.get(check, ABSENT)]) for check in _check_ids(verdicts)]
    return table("Conditions of the checks", ["check", "passes if"], rows)


def _overview(verdicts: Mapping[str, Any]) -> Table:
    checks = _check_ids(verdicts)
    rows = []
    for name, verdict in verdicts.items():
        statuses = {each["check"]: each["status"] for each in verdict["checks"]}
        cells = [Cell(statuses.get(check, ABSENT), status=statuses.get(check, "")) for check in checks]
        overall = Cell(verdict["verdict"], status=verdict["verdict"])
        rows.append(row([model_name(name), overall, *cells], emphasis=is_mixture(name)))
    return table(
        "Status by model and check; a failed check withholds the robust accuracy",
        ["model", "verdict", *map(_title, checks)],
        rows,
    )


def _model(name: str, verdict: Mapping[str, Any]) -> Details:
    results = table(
        f"{model_name(name)}: result of each check",
        ["check", "status", "result"],
        [
            row([f"{number}. {_title(each['check'])}", Cell(each["status"], status=each["status"]), each["sentence"]])
            for number, each in enumerate(verdict["checks"], start=1)
        ],
    )
    evidence = {each["check"]: each["evidence"] for each in verdict["checks"]}
    return Details(f"{model_name(name)}: results and evidence", (results, CodeBlock(json.dumps(evidence, indent=2))))

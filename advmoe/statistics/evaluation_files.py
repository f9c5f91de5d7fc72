"""What is said of a model in metrics/evaluate/<slug>.json and metrics/verdict.json, as far as findings need it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.settings import NonNegativeInt, PositiveInt, validate
from advmoe.core.snapshots import Snapshot, read_json
from advmoe.statistics.decisions import CLEAN, WORST, Decisions, slug

SCHEMA = 2  # of advmoe.evaluation.results, which loads torch
NOT_ASKED, FAIL = "not asked", "fail"


class Part(BaseModel):
    """A part of a report; what else stands there is of no concern here."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Counted(Part):
    """How many of how many images were right."""

    correct: NonNegativeInt
    total: PositiveInt


class Attack(Part):
    """What was asked of an attack."""

    settings: dict[str, Any]


class Terms(Part):
    """The terms of the evaluation: what its random numbers came from, and whether fallen images were spared."""

    seed: int
    drop_fallen: bool


class EvaluationFile(Part):
    """One model: accuracies (None: withheld), what the checks said of them, and the terms they were measured on."""

    model: str
    epsilon: float
    accuracy: dict[str, Counted | None]
    verdict: Literal["pass", "warn", "fail", "not asked"]
    withheld: tuple[str, ...]
    attacks: dict[str, Attack]
    terms: Terms

    @model_validator(mode="after")
    def _complete(self) -> "EvaluationFile":
        if not {CLEAN, WORST} <= set(self.accuracy):
            raise ValueError(f"accuracy must hold {CLEAN} and {WORST}")
        return self

    @property
    def judged(self) -> bool:
        """Whether it met all attacks and the checks were asked; ensembles and experts are not."""
        return self.verdict != NOT_ASKED


def path(model: str) -> Path:
    """Where the report on a model lies."""
    return paths.EVALUATION / f"{slug(model)}.json"


def read(record: Snapshot, model: str) -> EvaluationFile:
    """Raises AbsentError when there is no report on this model, UserError for one that this version cannot read."""
    return read_file(record, path(model))


def read_file(record: Snapshot, file: Path) -> EvaluationFile:
    """As `read`, by the file's path."""
    content = read_json(record, file)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise UserError(f"{record.name}: {file} has schema version {version}, this version of advmoe reads {SCHEMA}")
    return validate(content, EvaluationFile, f"{record.name}: {file}")


def failures(record: Snapshot, report: EvaluationFile) -> list[str]:
    """Why nothing may be claimed of how robust this model is; empty when no check failed. Raises UserError."""
    verdicts = read_json(record, paths.VERDICT)
    if not isinstance(verdicts, dict):
        raise UserError(f"{record.name}: {paths.VERDICT} must be a mapping of models")
    entry = verdicts.get(report.model)
    says_fail = isinstance(entry, dict) and entry.get("verdict") == FAIL
    if report.verdict == FAIL or says_fail:
        return list(report.withheld) or [f"a check failed, see {paths.VERDICT}"]
    return []


def check_agreement(record: Snapshot, report: EvaluationFile, decisions: Decisions) -> None:
    """Report and decisions must be of one run: every accuracy must follow from the decisions. Raises UserError."""
    for kind in {**report.accuracy, **decisions.correct}:
        if not _agrees(kind, report, decisions):
            raise UserError(f"{record.name}: decisions and report on {report.model} do not agree under {kind}")


def _agrees(kind: str, report: EvaluationFile, decisions: Decisions) -> bool:
    if kind not in report.accuracy or kind not in decisions.correct:
        return False
    stated = report.accuracy[kind]
    cells = [cell for cell in decisions.correct[kind] if cell is not None]
    return stated is None or (stated.correct, stated.total) == (sum(cells), len(cells))

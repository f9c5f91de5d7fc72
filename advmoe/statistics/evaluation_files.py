"""Reads the parts of metrics/evaluate/<slug>.json and metrics/verdict.json that claims and comparisons need."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.settings import NonNegativeInt, PositiveInt, validate
from advmoe.core.snapshots import Snapshot, read_json
from advmoe.statistics.decisions import CLEAN, WORST, Decisions, slug

SCHEMA = 2  # of advmoe.evaluation.summary, which imports torch
NOT_CHECKED, FAIL = "not asked", "fail"


class FileSection(BaseModel):
    """A section of a metrics file; other keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Counts(FileSection):
    """The number of images that were classified correctly, and of all images."""

    correct: NonNegativeInt
    total: PositiveInt


class AttackEntry(FileSection):
    """The settings of an attack."""

    settings: dict[str, Any]


class EvaluationTerms(FileSection):
    """The seed of the evaluation, and whether later attacks skip images that an attack succeeded on."""

    seed: int
    drop_fallen: bool


class EvaluationFile(FileSection):
    """The report on one model: accuracies (None: withheld), verdict of the checks, attacks and evaluation terms."""

    model: str
    epsilon: float
    accuracy: dict[str, Counts | None]
    verdict: Literal["pass", "warn", "fail", "not asked"]
    withheld: tuple[str, ...]
    attacks: dict[str, AttackEntry]
    terms: EvaluationTerms

    @model_validator(mode="after")
    def _complete(self) -> "EvaluationFile":
        if not {CLEAN, WORST} <= set(self.accuracy):
            raise ValueError(f"accuracy must hold {CLEAN} and {WORST}")
        return self

    @property
    def checked(self) -> bool:
        """Whether all attacks and all checks were run; not so for single experts and averages."""
        return self.verdict != NOT_CHECKED


def path(model: str) -> Path:
    """Returns the path of the report on a model."""
    return paths.EVALUATION / f"{slug(model)}.json"


def read(snapshot: Snapshot, model: str) -> EvaluationFile:
    """Reads the report on a model. Raises MissingFileError when it is missing, UserError when it is malformed."""
    return read_file(snapshot, path(model))


def read_file(snapshot: Snapshot, file: Path) -> EvaluationFile:
    """Reads a report by its path; see `read`."""
    content = read_json(snapshot, file)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise UserError(f"{snapshot.name}: {file} has schema version {version}, this version of advmoe reads {SCHEMA}")
    return validate(content, EvaluationFile, f"{snapshot.name}: {file}")


def withheld_reasons(snapshot: Snapshot, report: EvaluationFile) -> list[str]:
    """Returns why the robust accuracy of a model is withheld; empty if no check failed. Raises UserError."""
    verdicts = read_json(snapshot, paths.VERDICT)
    if not isinstance(verdicts, dict):
        raise UserError(f"{snapshot.name}: {paths.VERDICT} must be a mapping of models")
    entry = verdicts.get(report.model)
    verdict_failed = isinstance(entry, dict) and entry.get("verdict") == FAIL
    if report.verdict == FAIL or verdict_failed:
        return list(report.withheld) or [f"a check failed, see {paths.VERDICT}"]
    return []


def check_agreement(snapshot: Snapshot, report: EvaluationFile, decisions: Decisions) -> None:
    """Raises UserError when an accuracy of the report does not follow from the decisions of the same run."""
    for kind in {**report.accuracy, **decisions.correct}:
        if not _agrees(kind, report, decisions):
            raise UserError(f"{snapshot.name}: decisions and report on {report.model} do not agree under {kind}")


def _agrees(kind: str, report: EvaluationFile, decisions: Decisions) -> bool:
    if kind not in report.accuracy or kind not in decisions.correct:
        return False
    stated = report.accuracy[kind]
    cells = [cell for cell in decisions.correct[kind] if cell is not None]
    return stated is None or (stated.correct, stated.total) == (sum(cells), len(cells))

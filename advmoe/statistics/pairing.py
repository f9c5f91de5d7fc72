"""Collects the evidence for one claim from one snapshot: both models' decisions on the same images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from advmoe.core.settings import Settings
from advmoe.core.snapshots import MissingFileError, Snapshot
from advmoe.statistics import evaluation_files
from advmoe.statistics.decisions import CLEAN, WORST, Decisions
from advmoe.statistics.evaluation_files import EvaluationFile
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import PairedDifference, compare_paired

NonEmptyStr = Annotated[str, Field(min_length=1)]
NoEvidenceStatus = Literal["withheld", "not judged"]


class Claim(Settings):
    """`model` is more accurate than `over` under `clean`, an attack, or `worst`, the worst case over all attacks."""

    model: NonEmptyStr
    over: NonEmptyStr
    under: NonEmptyStr

    @model_validator(mode="after")
    def _two_models(self) -> "Claim":
        if self.model == self.over:
            raise ValueError(f"compares {self.model} with itself")
        return self

    def __str__(self) -> str:
        return f"{self.model} beats {self.over} under {self.under}"


@dataclass(frozen=True)
class PairedEvidence:
    """The accuracies of both models and their paired difference on the same images. `note` qualifies the comparison."""

    model: Proportion
    over: Proportion
    paired: PairedDifference
    note: str

    def as_dict(self) -> dict[str, Any]:
        """Returns the evidence for JSON."""
        paired = self.paired.as_dict()
        return {"model": self.model.as_dict(), "over": self.over.as_dict(), "paired": paired, "note": self.note}


@dataclass(frozen=True)
class NoEvidence:
    """Why there is no evidence: "withheld" after a failed check, "not judged" where results are missing or differ."""

    status: NoEvidenceStatus
    reason: str


@dataclass(frozen=True)
class ModelData:
    """The decisions and the evaluation report of one model."""

    decisions: Decisions
    report: EvaluationFile

    @property
    def name(self) -> str:
        """The model's name."""
        return self.decisions.model


def collect_evidence(snapshot: Snapshot, claim: Claim, seed: int) -> PairedEvidence | NoEvidence:
    """Returns the evidence for a claim. `seed` seeds the bootstrap. Raises UserError when a file is malformed."""
    try:
        first, second = _read_model(snapshot, claim.model), _read_model(snapshot, claim.over)
        no_evidence = _check_verdicts(snapshot, first, second) or _check_comparable(first, second, claim)
    except MissingFileError as error:
        return NoEvidence("not judged", str(error))
    if no_evidence is not None:
        return no_evidence
    columns = _columns(first, second, claim)
    pairs = list(_paired_decisions(first, second, columns))
    if not pairs:
        return NoEvidence("not judged", f"no image was attacked by {claim.under} on both models")
    model_N, over_N = torch.tensor(pairs, dtype=torch.bool).unbind(1)
    paired = compare_paired(model_N, over_N, seed)
    note = _note(first, second, claim, columns)
    return PairedEvidence(Proportion.from_mask(model_N), Proportion.from_mask(over_N), paired, note)


def _read_model(snapshot: Snapshot, name: str) -> ModelData:
    model = ModelData(Decisions.read(snapshot, name), evaluation_files.read(snapshot, name))
    evaluation_files.check_agreement(snapshot, model.report, model.decisions)
    return model


def _check_verdicts(snapshot: Snapshot, *models: ModelData) -> NoEvidence | None:
    reasons = [
        f"{model.name}: {reason}"
        for model in models
        for reason in evaluation_files.withheld_reasons(snapshot, model.report)
    ]
    return NoEvidence("withheld", "; ".join(reasons)) if reasons else None


def _check_comparable(first: ModelData, second: ModelData, claim: Claim) -> NoEvidence | None:
    names = f"{first.name} and {second.name}"
    if not first.decisions.same_images(second.decisions):
        return NoEvidence("not judged", f"{names} were not evaluated on the same images in the same order")
    if first.report.epsilon != second.report.epsilon:
        return NoEvidence("not judged", f"{names} were attacked with different epsilon")
    if claim.under in {CLEAN, WORST}:
        common = claim.under == CLEAN or _use_full_worst_case(first, second) or _common_attacks(first, second)
        return None if common else NoEvidence("not judged", f"{names} have no attack in common")
    not_attacked = [model.name for model in (first, second) if claim.under not in model.decisions.attacks]
    return NoEvidence("not judged", f"{not_attacked[0]} was not attacked by {claim.under}") if not_attacked else None


def _use_full_worst_case(*models: ModelData) -> bool:
    """Whether each model's own worst case is compared: leaving out gate-aware attacks would favour a mixture."""
    return all(model.report.checked for model in models)


def _common_attacks(first: ModelData, second: ModelData) -> list[str]:
    return [attack for attack in first.decisions.attacks if attack in second.decisions.attacks]


def _columns(first: ModelData, second: ModelData, claim: Claim) -> list[str]:
    """The columns in which an image must be correct to count as correct."""
    if claim.under == WORST and not _use_full_worst_case(first, second):
        return [CLEAN, *_common_attacks(first, second)]
    return [claim.under]


def _paired_decisions(first: ModelData, second: ModelData, columns: list[str]) -> Iterator[tuple[bool, bool]]:
    """Yields per image whether each model is correct in all columns decided for both; skips images without any."""
    decisions = [(first.decisions.correct[column], second.decisions.correct[column]) for column in columns]
    for image in range(len(first.decisions.index)):
        cells = [(left[image], right[image]) for left, right in decisions]
        both = [(left, right) for left, right in cells if left is not None and right is not None]
        if both:
            yield all(left for left, _ in both), all(right for _, right in both)


def _note(first: ModelData, second: ModelData, claim: Claim, columns: list[str]) -> str:
    models = (first, second)
    notes = []
    if columns != [claim.under]:
        unchecked = " and ".join(model.name for model in models if not model.report.checked)
        notes += [
            f"over the attacks run on both ({', '.join(columns[1:])}), as not all attacks were run on {unchecked}"
        ]
    elif claim.under == WORST and set(first.decisions.attacks) != set(second.decisions.attacks):
        notes += ["each in the worst case over all attacks run on it"]
    if columns[-1] not in {CLEAN, WORST} and any(model.report.terms.drop_fallen for model in models):
        notes += ["an image misclassified under an earlier attack counts as misclassified"]
    return "; ".join(notes)

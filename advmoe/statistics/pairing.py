"""The evidence for one claim in one record: two models on the same images, or the reason why there is none."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from advmoe.core.settings import Settings
from advmoe.core.snapshots import AbsentError, Snapshot
from advmoe.statistics import evaluation_files
from advmoe.statistics.decisions import CLEAN, WORST, Decisions
from advmoe.statistics.evaluation_files import EvaluationFile
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import PairedDifference, compare

Text = Annotated[str, Field(min_length=1)]
Refused = Literal["withheld", "not judged"]


class Claim(Settings):
    """`model` is more accurate than `over` under `clean`, an attack or `worst`, the worst case over all attacks."""

    model: Text
    over: Text
    under: Text

    @model_validator(mode="after")
    def _two_models(self) -> "Claim":
        if self.model == self.over:
            raise ValueError(f"compares {self.model} with itself")
        return self

    def __str__(self) -> str:
        return f"{self.model} beats {self.over} under {self.under}"


@dataclass(frozen=True)
class Evidence:
    """Accuracies of both models and their paired difference, on the same images; `note`: what to know of how."""

    model: Share
    over: Share
    paired: PairedDifference
    note: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        paired = self.paired.as_dict()
        return {"model": self.model.as_dict(), "over": self.over.as_dict(), "paired": paired, "note": self.note}


@dataclass(frozen=True)
class Refusal:
    """Why there is no evidence: a failed check withholds it, or it cannot be judged from this record."""

    status: Refused
    reason: str


@dataclass(frozen=True)
class Side:
    """One of the two models: what was decided and what was reported of it."""

    decisions: Decisions
    report: EvaluationFile

    @property
    def name(self) -> str:
        """The model's name."""
        return self.decisions.model


def weigh(record: Snapshot, claim: Claim, seed: int) -> Evidence | Refusal:
    """The evidence of a record. `seed`: of the bootstrap. Raises UserError when the record is broken."""
    try:
        first, second = _side(record, claim.model), _side(record, claim.over)
        refusal = _withheld(record, first, second) or _incomparable(first, second, claim)
    except AbsentError as error:
        return Refusal("not judged", str(error))
    if refusal is not None:
        return refusal
    kinds = _kinds(first, second, claim)
    pairs = list(_pairs(first, second, kinds))
    if not pairs:
        return Refusal("not judged", f"no image met {claim.under} on both models")
    model_N, over_N = torch.tensor(pairs, dtype=torch.bool).unbind(1)
    paired = compare(model_N, over_N, seed)
    return Evidence(Share.of(model_N), Share.of(over_N), paired, _note(first, second, claim, kinds))


def _side(record: Snapshot, model: str) -> Side:
    side = Side(Decisions.read(record, model), evaluation_files.read(record, model))
    evaluation_files.check_agreement(record, side.report, side.decisions)
    return side


def _withheld(record: Snapshot, *sides: Side) -> Refusal | None:
    reasons = [f"{side.name}: {why}" for side in sides for why in evaluation_files.failures(record, side.report)]
    return Refusal("withheld", "; ".join(reasons)) if reasons else None


def _incomparable(first: Side, second: Side, claim: Claim) -> Refusal | None:
    names = f"{first.name} and {second.name}"
    if not first.decisions.same_images(second.decisions):
        return Refusal("not judged", f"{names} were not evaluated on the same images in the same order")
    if first.report.epsilon != second.report.epsilon:
        return Refusal("not judged", f"{names} were attacked with different epsilon")
    if claim.under in {CLEAN, WORST}:
        common = claim.under == CLEAN or _own_worst(first, second) or _common(first, second)
        return None if common else Refusal("not judged", f"{names} met no attack in common")
    strangers = [side.name for side in (first, second) if claim.under not in side.decisions.attacks]
    return Refusal("not judged", f"{strangers[0]} did not meet {claim.under}") if strangers else None


def _own_worst(*sides: Side) -> bool:
    """Whether each one's own worst case counts: to leave gate-aware attacks out would flatter a mixture."""
    return all(side.report.judged for side in sides)


def _common(first: Side, second: Side) -> list[str]:
    return [attack for attack in first.decisions.attacks if attack in second.decisions.attacks]


def _kinds(first: Side, second: Side, claim: Claim) -> list[str]:
    """The columns in which an image must be right to count as right."""
    if claim.under == WORST and not _own_worst(first, second):
        return [CLEAN, *_common(first, second)]
    return [claim.under]


def _pairs(first: Side, second: Side, kinds: list[str]) -> Iterator[tuple[bool, bool]]:
    """Per image, whether each is right in all columns that hold a decision on both; images without one are left out."""
    columns = [(first.decisions.correct[kind], second.decisions.correct[kind]) for kind in kinds]
    for image in range(len(first.decisions.index)):
        cells = [(left[image], right[image]) for left, right in columns]
        both = [(left, right) for left, right in cells if left is not None and right is not None]
        if both:
            yield all(left for left, _ in both), all(right for _, right in both)


def _note(first: Side, second: Side, claim: Claim, kinds: list[str]) -> str:
    sides = (first, second)
    notes = []
    if kinds != [claim.under]:
        unjudged = " and ".join(side.name for side in sides if not side.report.judged)
        notes += [
            f"over the attacks that both met ({', '.join(kinds[1:])}), as the full suite did not judge {unjudged}"
        ]
    elif claim.under == WORST and set(first.decisions.attacks) != set(second.decisions.attacks):
        notes += ["each in the worst case of all attacks that it met"]
    if kinds[-1] not in {CLEAN, WORST} and any(side.report.terms.drop_fallen for side in sides):
        notes += ["an image that fell to an earlier attack counts as fallen"]
    return "; ".join(notes)

"""Claims about these checkpoints: one model against another, image by image, and how sure one can be.

Nothing here says whether training again would give the same: that is for `advmoe.statistics.aggregation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.core import console
from advmoe.core.snapshots import Snapshot, commit_of
from advmoe.statistics.intervals import Share
from advmoe.statistics.pairing import Claim, Evidence, Refusal, weigh

SCHEMA = 1
ALPHA = 0.05  # chance, at most, of one false finding in the whole family of claims
SUPPORTED, CONTRADICTED, NOT_SUPPORTED = "supported", "contradicted", "not supported"
DIGITS = 6

__all__ = ["Claim", "ClaimResult", "ClaimResults", "holm", "judge", "show"]


@dataclass(frozen=True)
class ClaimResult:
    """What became of a claim. `evidence` and `holm`, the adjusted p-value, are there unless it was refused."""

    name: str
    claim: Claim
    status: str
    sentence: str
    evidence: Evidence | None = None
    holm: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        evidence = None if self.evidence is None else self.evidence.as_dict()
        about = {"claim": self.claim.model_dump(), "status": self.status, "sentence": self.sentence}
        return {**about, "p_holm": self.holm, "evidence": evidence}


@dataclass(frozen=True)
class ClaimResults:
    """All claims about one record; those that could be judged are one family."""

    record: str
    commit: str | None
    findings: tuple[ClaimResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema_version": SCHEMA,
            "record": self.record,
            "commit": self.commit,
            "alpha": ALPHA,
            "judged": sum(finding.evidence is not None for finding in self.findings),
            "claims": {finding.name: finding.as_dict() for finding in self.findings},
        }


def judge(record: Snapshot, claims: Mapping[str, Claim], seed: int) -> ClaimResults:
    """Every claim from the decisions in a record: exact McNemar test, adjusted over all that could be judged.

    `seed`: of the bootstrap intervals. Raises UserError when the record is broken; what it merely lacks is a reason
    not to judge.
    """
    weighed = {name: weigh(record, claim, seed) for name, claim in claims.items()}
    evidence = {name: found for name, found in weighed.items() if isinstance(found, Evidence)}
    adjusted = dict(zip(evidence, holm([found.paired.p for found in evidence.values()]), strict=True))
    findings = (_finding(name, claims[name], found, adjusted.get(name)) for name, found in weighed.items())
    return ClaimResults(record.name, commit_of(record), tuple(findings))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979, step down): comparing each with alpha keeps the chance of any
    false finding in the family at alpha, whatever the dependence between the tests.
    """
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(order):
        # no smaller than its predecessor's: a claim cannot be surer than one with more evidence
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = round(largest, DIGITS)
    return adjusted


def status(difference: float, adjusted: float) -> str:
    """What a difference in favour of a claim (positive) and its adjusted p-value say of it."""
    if adjusted >= ALPHA or difference == 0:
        return NOT_SUPPORTED
    return SUPPORTED if difference > 0 else CONTRADICTED


def format_p(p: float) -> str:
    """A p-value as `= 0.041` or, where rounding left nothing, `< 1e-06`."""
    return f"< {10**-DIGITS:.0e}" if p < 10**-DIGITS else f"= {p:.2g}"


def show(findings: ClaimResults) -> None:
    """Print what became of each claim, with its numbers."""
    rows = [[str(finding.claim), finding.status, finding.sentence] for finding in findings.findings]
    console.listing(f"claims about the checkpoints of {findings.record}", ["claim", "", "evidence"], rows)


def _finding(name: str, claim: Claim, found: Evidence | Refusal, adjusted: float | None) -> ClaimResult:
    if isinstance(found, Refusal):
        return ClaimResult(name, claim, found.status, found.reason)
    assert adjusted is not None
    sentence = _sentence(claim, found, adjusted)
    return ClaimResult(name, claim, status(found.paired.difference, adjusted), sentence, found, adjusted)


def _sentence(claim: Claim, found: Evidence, adjusted: float) -> str:
    paired = found.paired
    return (
        f"{claim.model} {_percent(found.model)}, {claim.over} {_percent(found.over)}: difference "
        f"{100 * paired.difference:+.1f} points [{100 * paired.low:.1f}, {100 * paired.high:.1f}], "
        f"{paired.only_first} images against {paired.only_second}, p {format_p(paired.p)}, "
        f"Holm {format_p(adjusted).removeprefix('= ')}" + (f"; {found.note}" if found.note else "")
    )


def _percent(share: Share) -> str:
    return f"{100 * share.accuracy:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"

"""Tests claims about the checkpoints of one run: one model against another on the same images.

Whether training with other seeds gives the same result is tested by `advmoe.statistics.aggregation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.core import console
from advmoe.core.snapshots import Snapshot, commit_hash
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.pairing import Claim, NoEvidence, PairedEvidence, collect_evidence

SCHEMA = 1
ALPHA = 0.05  # family-wise error rate: the probability of any false positive among all claims
SUPPORTED, CONTRADICTED, NOT_SUPPORTED = "supported", "contradicted", "not supported"
DIGITS = 6

__all__ = ["Claim", "ClaimResult", "ClaimResults", "evaluate_claims", "holm_correction", "show"]


@dataclass(frozen=True)
class ClaimResult:
    """The status of one claim. `evidence` and `adjusted_p` (Holm) are None if the claim could not be tested."""

    name: str
    claim: Claim
    status: str
    sentence: str
    evidence: PairedEvidence | None = None
    adjusted_p: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the result for JSON."""
        evidence = None if self.evidence is None else self.evidence.as_dict()
        about = {"claim": self.claim.model_dump(), "status": self.status, "sentence": self.sentence}
        return {**about, "p_holm": self.adjusted_p, "evidence": evidence}


@dataclass(frozen=True)
class ClaimResults:
    """The results of all claims about one snapshot. The claims that could be tested form one family."""

    snapshot_name: str
    commit: str | None
    results: tuple[ClaimResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the results for JSON."""
        return {
            "schema_version": SCHEMA,
            "record": self.snapshot_name,
            "commit": self.commit,
            "alpha": ALPHA,
            "judged": sum(result.evidence is not None for result in self.results),
            "claims": {result.name: result.as_dict() for result in self.results},
        }


def evaluate_claims(snapshot: Snapshot, claims: Mapping[str, Claim], seed: int) -> ClaimResults:
    """Tests claims with exact McNemar tests on the decisions in a snapshot, Holm-adjusted over all tested claims.

    `seed` seeds the bootstrap intervals. Raises UserError when a file is malformed; a claim that lacks a file is
    "not judged".
    """
    evidence = {name: collect_evidence(snapshot, claim, seed) for name, claim in claims.items()}
    p_values = {name: each.paired.p for name, each in evidence.items() if isinstance(each, PairedEvidence)}
    adjusted = dict(zip(p_values, holm_correction(list(p_values.values())), strict=True))
    results = (_claim_result(name, claims[name], each, adjusted.get(name)) for name, each in evidence.items())
    return ClaimResults(snapshot.name, commit_hash(snapshot), tuple(results))


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Returns step-down adjusted p-values (Holm 1979), in the given order.

    Rejecting where the adjusted value is below alpha keeps the family-wise error rate at alpha under any dependence
    between the tests.
    """
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(order):
        # monotone: never below the adjusted value of a smaller p-value
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = round(largest, DIGITS)
    return adjusted


def claim_status(difference: float, adjusted_p: float) -> str:
    """Returns the status of a claim from the difference (positive: in its favour) and its adjusted p-value."""
    if adjusted_p >= ALPHA or difference == 0:
        return NOT_SUPPORTED
    return SUPPORTED if difference > 0 else CONTRADICTED


def format_p_value(p: float) -> str:
    """Formats a p-value as `= 0.041`, or as `< 1e-06` where it was rounded to 0."""
    return f"< {10**-DIGITS:.0e}" if p < 10**-DIGITS else f"= {p:.2g}"


def show(results: ClaimResults) -> None:
    """Prints a table of claims with their status and evidence."""
    rows = [[str(result.claim), result.status, result.sentence] for result in results.results]
    console.text_table(
        f"claims about the checkpoints of {results.snapshot_name}", ["claim", "status", "evidence"], rows
    )


def _claim_result(
    name: str, claim: Claim, evidence: PairedEvidence | NoEvidence, adjusted_p: float | None
) -> ClaimResult:
    if isinstance(evidence, NoEvidence):
        return ClaimResult(name, claim, evidence.status, evidence.reason)
    assert adjusted_p is not None
    sentence = _sentence(claim, evidence, adjusted_p)
    status = claim_status(evidence.paired.difference, adjusted_p)
    return ClaimResult(name, claim, status, sentence, evidence, adjusted_p)


def _sentence(claim: Claim, evidence: PairedEvidence, adjusted_p: float) -> str:
    paired = evidence.paired
    return (
        f"{claim.model} {_percent(evidence.model)}, {claim.over} {_percent(evidence.over)}: difference "
        f"{100 * paired.difference:+.1f} points [{100 * paired.low:.1f}, {100 * paired.high:.1f}], "
        f"{paired.only_first} images against {paired.only_second}, p {format_p_value(paired.p)}, "
        f"Holm {format_p_value(adjusted_p).removeprefix('= ')}" + (f"; {evidence.note}" if evidence.note else "")
    )


def _percent(proportion: Proportion) -> str:
    return f"{100 * proportion.accuracy:.1f} % [{100 * proportion.low:.1f}, {100 * proportion.high:.1f}]"

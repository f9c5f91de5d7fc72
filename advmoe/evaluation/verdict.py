"""The verdict: what ten checks say of an evaluation, and whether its headline may be printed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from advmoe import console
from advmoe.evaluation.checks.binarisation import binarisation
from advmoe.evaluation.checks.blackbox import blackbox
from advmoe.evaluation.checks.budget import budget
from advmoe.evaluation.checks.case import Case, Finding, Status
from advmoe.evaluation.checks.determinism import determinism
from advmoe.evaluation.checks.gradients import gradients
from advmoe.evaluation.checks.isolation import isolation
from advmoe.evaluation.checks.iterations import iterations
from advmoe.evaluation.checks.pgd_gap import pgd_gap
from advmoe.evaluation.checks.plumbing import plumbing
from advmoe.evaluation.checks.progress import progress

# in the order of the specification, so that numbers in reports agree with it
CHECKS = (
    iterations,
    budget,
    blackbox,
    gradients,
    determinism,
    isolation,
    progress,
    pgd_gap,
    binarisation,
    plumbing,
)
ORDER: tuple[Status, ...] = ("fail", "warn", "not checked", "pass")


@dataclass(frozen=True)
class Verdict:
    """The findings, one a check."""

    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The worst of them: fail withholds the headline. Not checked counts as pass where others were checked."""
        found = {finding.status for finding in self.findings}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    @property
    def reasons(self) -> list[str]:
        """Why the headline is withheld; empty when it is not."""
        return [f"{finding.check}: {finding.sentence}" for finding in self.findings if finding.status == "fail"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verdict": self.status, "checks": [asdict(finding) for finding in self.findings]}


def judge(case: Case) -> Verdict:
    """Ask every check."""
    return Verdict(tuple(_asked(case)))


def _asked(case: Case) -> Iterator[Finding]:
    for check in console.track(CHECKS, f"{case.target.name}: checks", len(CHECKS)):
        yield check(case)


def show(name: str, verdict: Verdict) -> None:
    """Print what the checks say, worst first."""
    ordered = sorted(enumerate(verdict.findings, start=1), key=lambda item: ORDER.index(item[1].status))
    rows = [[f"{number}. {finding.check}", finding.status, finding.sentence] for number, finding in ordered]
    console.listing(f"{name}: may this be believed?", ["check", "", "evidence"], rows)

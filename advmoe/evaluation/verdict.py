"""The verdict: what ten checks say of an evaluation, and whether its headline may be printed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from advmoe.core import console
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Status
from advmoe.evaluation.checks.batch_independence import batch_independence
from advmoe.evaluation.checks.binarisation import binarisation
from advmoe.evaluation.checks.blackbox import blackbox
from advmoe.evaluation.checks.consistency import consistency
from advmoe.evaluation.checks.convergence import convergence
from advmoe.evaluation.checks.determinism import determinism
from advmoe.evaluation.checks.epsilon_sweep import epsilon_sweep
from advmoe.evaluation.checks.gradients import gradients
from advmoe.evaluation.checks.loss_increase import loss_increase
from advmoe.evaluation.checks.pgd_gap import pgd_gap

# in the order of the specification, so that numbers in reports agree with it
CHECKS = (
    convergence,
    epsilon_sweep,
    blackbox,
    gradients,
    determinism,
    batch_independence,
    loss_increase,
    pgd_gap,
    binarisation,
    consistency,
)
ORDER: tuple[Status, ...] = ("fail", "warn", "not checked", "pass")


@dataclass(frozen=True)
class Verdict:
    """The findings, one a check."""

    findings: tuple[CheckResult, ...]

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


def judge(case: CheckContext) -> Verdict:
    """Ask every check."""
    return Verdict(tuple(_asked(case)))


def _asked(case: CheckContext) -> Iterator[CheckResult]:
    for check in console.track(CHECKS, f"{case.target.name}: checks", len(CHECKS)):
        yield check(case)


def show(name: str, verdict: Verdict) -> None:
    """Print what the checks say, worst first."""
    ordered = sorted(enumerate(verdict.findings, start=1), key=lambda item: ORDER.index(item[1].status))
    rows = [[f"{number}. {finding.check}", finding.status, finding.sentence] for number, finding in ordered]
    console.listing(f"{name}: may this be believed?", ["check", "", "evidence"], rows)

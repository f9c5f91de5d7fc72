"""The verdict: runs the ten checks on an evaluation and decides whether its headline may be printed."""

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

# the order of the specification; reports number the checks by it
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
TITLES = {  # by id, in the same order
    "iterations": "convergence",
    "budget": "epsilon sweep",
    "blackbox": "black-box attacks",
    "gradients": "gradients",
    "determinism": "determinism",
    "isolation": "batch independence",
    "progress": "loss increase",
    "pgd_gap": "gap of PGD",
    "binarisation": "binarisation test",
    "plumbing": "consistency",
}
DISPLAY_ORDER: tuple[Status, ...] = ("fail", "warn", "not checked", "pass")


@dataclass(frozen=True)
class Verdict:
    """The results of all checks."""

    results: tuple[CheckResult, ...]

    @property
    def status(self) -> Status:
        """The worst status: `fail` withholds the headline, `not checked` counts as `pass`."""
        statuses = {result.status for result in self.results}
        return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "pass"

    @property
    def reasons(self) -> list[str]:
        """Sentences of the failed checks."""
        return [f"{result.check}: {result.sentence}" for result in self.results if result.status == "fail"]

    def as_dict(self) -> dict[str, Any]:
        """The verdict for JSON."""
        return {"verdict": self.status, "checks": [asdict(result) for result in self.results]}


def run_checks(context: CheckContext) -> Verdict:
    """Runs every check."""
    checks = console.track(CHECKS, f"{context.target.name}: checks", len(CHECKS))
    return Verdict(tuple(check(context) for check in checks))


def show(name: str, verdict: Verdict) -> None:
    """Prints the results of the checks, worst first."""
    ordered = sorted(enumerate(verdict.results, start=1), key=lambda item: DISPLAY_ORDER.index(item[1].status))
    rows = [[f"{number}. {TITLES[result.check]}", result.status, result.sentence] for number, result in ordered]
    console.text_table(f"{name}: checks of the evaluation", ["check", "", "evidence"], rows)

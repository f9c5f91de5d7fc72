"""Check 1, convergence: many steps are stronger than one, and more steps and restarts fool the model no more often.

Carlini et al. 2019, arXiv 1902.06705. An iterative attack that is weaker than one step follows misleading gradients;
one that improves with more steps has not converged. The second run attacks only the survivors of the first, so more
steps are never weaker by chance.

Shapes: N images of the evaluation, n probe images.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advmoe.attacks.fgsm import Fgsm
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import Issue, ProbeSet, percent
from advmoe.statistics.paired_tests import PairedDifference

STREAM = "check-iterations"


def convergence(context: CheckContext) -> CheckResult:
    """Compares one step with many, many with more, and the white-box attacks of the evaluation with all of these."""
    return probe_attacks.run_check("iterations", _check, context)


@dataclass(frozen=True)
class _ProbeRuns:
    """Correct (n,) after one step; after many; and after a second run with a new start and twice the steps."""

    one: Tensor
    many: Tensor
    more: Tensor

    def accuracies(self) -> dict[str, float]:
        runs = {"fgsm": self.one, "pgd": self.many, "pgd_more": self.more}
        return {name: float(right.float().mean()) for name, right in runs.items()}


def _check(context: CheckContext) -> probe_attacks.CheckOutput:
    probe = probe_attacks.probe_images(context)
    runs = _run(context, probe)
    evidence: dict[str, Any] = {"images": len(probe.rows), "steps": context.settings.steps, **runs.accuracies()}
    if names := probe_attacks.white_box(context):
        evidence["white_box"] = float(context.result.correct_under(names)[probe.rows].float().mean())
    passed = (
        f"accuracy on {len(probe.rows)} probe images is {percent(evidence['pgd'])} under PGD and "
        f"{percent(evidence['fgsm'])} under one step; a second run with twice the steps does not lower it significantly"
    )
    issues = [
        *_single_step_issues(context, runs),
        *_effort_issues(context, runs),
        *_evaluation_issues(context, probe, runs),
    ]
    return *probe_attacks.worst_status(issues, passed), evidence


def _run(context: CheckContext, probe: ProbeSet) -> _ProbeRuns:
    ball, steps = context.config.ball, context.settings.steps
    one = probe_attacks.survivors(context, probe, Fgsm(kind="fgsm"), ball, None)
    many = probe_attacks.survivors(context, probe, probe_attacks.plain_pgd(steps), ball, STREAM)
    more = probe_attacks.attack_survivors(
        context, probe, many, probe_attacks.plain_pgd(2 * steps), ball, f"{STREAM}-again"
    )
    return _ProbeRuns(one, many, more)


def _single_step_issues(context: CheckContext, runs: _ProbeRuns) -> list[Issue]:
    if probe_attacks.paired_difference(runs.many, runs.one, context).low <= 0:
        return []
    shares = runs.accuracies()
    sentence = f"accuracy is {percent(shares['fgsm'])} under one FGSM step and {percent(shares['pgd'])} under PGD"
    return [("fail", f"{sentence}: an attack that is weaker with more steps follows masked gradients")]


def _effort_issues(context: CheckContext, runs: _ProbeRuns) -> list[Issue]:
    """A warning at most: `_evaluation_issues` decides whether the attacks of the evaluation are too weak."""
    drop = probe_attacks.paired_difference(runs.many, runs.more, context)
    if drop.low <= 0:
        return []
    sentence = f"a second run with twice the steps fools {percent(drop.difference)} more of the images"
    return [("warn", f"{sentence}: PGD has not converged after {context.settings.steps} steps on this model")]


def _evaluation_issues(context: CheckContext, probe: ProbeSet, runs: _ProbeRuns) -> list[Issue]:
    """The white-box attacks of the evaluation must not be weaker than the probe attacks."""
    names = probe_attacks.white_box(context)
    iterative = [name for name in names if not isinstance(context.attacks[name], Fgsm)]
    issues: list[Issue] = []
    single_step = _missed_by_evaluation(context, probe, iterative, runs.one)
    if single_step and single_step.low > 0:
        sentence = (
            f"one FGSM step fools {percent(single_step.difference)} more of the images than {', '.join(iterative)} did"
        )
        issues.append(("fail", f"{sentence}: these attacks are broken, too weak, or misled by masked gradients"))
    if missed := _missed_by_evaluation(context, probe, names, runs.more):
        sentence = (
            f"a plain PGD of {2 * context.settings.steps} steps fools {percent(missed.difference)} more of the images"
        )
        sentence += f" than {', '.join(names)} did: the attacks of the evaluation are too weak"
        issues.append((probe_attacks.drop_status(missed), sentence))
    return issues


def _missed_by_evaluation(
    context: CheckContext, probe: ProbeSet, names: list[str], right_n: Tensor
) -> PairedDifference | None:
    """Accuracy under these attacks minus that under a probe attack, on the images within their limits."""
    scheduled_n = probe_attacks.scheduled(context, names)[probe.rows]
    if not scheduled_n.any():
        return None
    return probe_attacks.paired_difference(
        context.result.correct_under(names)[probe.rows][scheduled_n], right_n[scheduled_n], context
    )

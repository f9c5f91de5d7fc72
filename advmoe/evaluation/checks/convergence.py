"""Check 1: many steps beat one, and still more steps and restarts find nothing new (Carlini et al. 2019, 1902.06705).

An iterative attack that one step outdoes was led astray by the gradients it followed; one that finds more the longer it
runs had not arrived. The second run only meets the images that the first one left, so more
effort is never weaker by luck.

Shapes: N images of the evaluation, n probe images.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advmoe.attacks.fgsm import Fgsm
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import ProbeSet, Remark, percent
from advmoe.statistics.paired_tests import PairedDifference

PURPOSE = "check-iterations"


def convergence(case: CheckContext) -> CheckResult:
    """One step against many, many against more, and the evaluation's own white-box attacks against all of these."""
    return probe_attacks.run_check("iterations", _answer, case)


@dataclass(frozen=True)
class _Runs:
    """Who (n,) is right after one step; after many; and after a second run too, from a new start and twice as long."""

    one: Tensor
    many: Tensor
    more: Tensor

    def accuracies(self) -> dict[str, float]:
        runs = {"fgsm": self.one, "pgd": self.many, "pgd_more": self.more}
        return {name: float(right.float().mean()) for name, right in runs.items()}


def _answer(case: CheckContext) -> probe_attacks.Answer:
    probe = probe_attacks.probe_images(case)
    runs = _run(case, probe)
    evidence: dict[str, Any] = {"images": len(probe.rows), "steps": case.probes.steps, **runs.accuracies()}
    if names := probe_attacks.white_box(case):
        evidence["white_box"] = float(case.measured.over(names)[probe.rows].float().mean())
    otherwise = (
        f"PGD leaves {percent(evidence['pgd'])} of {len(probe.rows)} probe images standing, one step "
        f"{percent(evidence['fgsm'])}; a second run with twice the steps finds no more than chance would"
    )
    remarks = [*_one_step(case, runs), *_effort(case, runs), *_suite(case, probe, runs)]
    return *probe_attacks.worst_status(remarks, otherwise), evidence


def _run(case: CheckContext, probe: ProbeSet) -> _Runs:
    ball, steps = case.terms.ball, case.probes.steps
    one = probe_attacks.survivors(case, probe, Fgsm(kind="fgsm"), ball, None)
    many = probe_attacks.survivors(case, probe, probe_attacks.plain_pgd(steps), ball, PURPOSE)
    more = probe_attacks.attack_survivors(
        case, probe, many, probe_attacks.plain_pgd(2 * steps), ball, f"{PURPOSE}-again"
    )
    return _Runs(one, many, more)


def _one_step(case: CheckContext, runs: _Runs) -> list[Remark]:
    if probe_attacks.change(runs.many, runs.one, case).low <= 0:
        return []
    shares = runs.accuracies()
    sentence = f"one FGSM step leaves {percent(shares['fgsm'])} standing, PGD {percent(shares['pgd'])}"
    return [("fail", f"{sentence}: an attack that gets weaker with more steps follows masked gradients")]


def _effort(case: CheckContext, runs: _Runs) -> list[Remark]:
    """A warning at most: whether the evaluation itself missed something is `_suite`'s question."""
    drop = probe_attacks.change(runs.many, runs.more, case)
    if drop.low <= 0:
        return []
    sentence = f"a second run with twice the steps takes {percent(drop.difference)} more of the images"
    return [("warn", f"{sentence}: PGD has not converged after {case.probes.steps} steps on this model")]


def _suite(case: CheckContext, probe: ProbeSet, runs: _Runs) -> list[Remark]:
    """What the probes found and the evaluation did not: its white-box attacks must not be weaker than these."""
    names = probe_attacks.white_box(case)
    climbing = [name for name in names if not isinstance(case.attacks[name], Fgsm)]
    remarks: list[Remark] = []
    lost = _missed(case, probe, climbing, runs.one)
    if lost and lost.low > 0:
        sentence = f"one FGSM step fools {percent(lost.difference)} more of the images than {', '.join(climbing)} did"
        remarks.append(("fail", f"{sentence}: these attacks are broken, too weak, or misled by masked gradients"))
    if missed := _missed(case, probe, names, runs.more):
        sentence = f"a plain PGD of {2 * case.probes.steps} steps fools {percent(missed.difference)} more of the images"
        sentence += f" than {', '.join(names)} did: the attacks tried were too weak"
        remarks.append((probe_attacks.found_more(missed), sentence))
    return remarks


def _missed(case: CheckContext, probe: ProbeSet, names: list[str], right_n: Tensor) -> PairedDifference | None:
    """How much better the model did under these attacks than in a probe, on the images that were to meet both."""
    due_n = probe_attacks.due(case, names)[probe.rows]
    if not due_n.any():
        return None
    return probe_attacks.change(case.measured.over(names)[probe.rows][due_n], right_n[due_n], case)

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
from advmoe.evaluation.checks import probing
from advmoe.evaluation.checks.case import Case, Finding
from advmoe.evaluation.checks.probing import Remark, Stage, percent
from advmoe.evaluation.paired import Paired

PURPOSE = "check-iterations"


def iterations(case: Case) -> Finding:
    """One step against many, many against more, and the evaluation's own white-box attacks against all of these."""
    return probing.answered("iterations", _answer, case)


@dataclass(frozen=True)
class _Runs:
    """Who (n,) is right after one step; after many; and after a second run too, from a new start and twice as long."""

    one: Tensor
    many: Tensor
    more: Tensor

    def accuracies(self) -> dict[str, float]:
        runs = {"fgsm": self.one, "pgd": self.many, "pgd_more": self.more}
        return {name: float(right.float().mean()) for name, right in runs.items()}


def _answer(case: Case) -> probing.Answer:
    probe = probing.stage(case)
    runs = _run(case, probe)
    evidence: dict[str, Any] = {"images": len(probe.rows), "steps": case.probes.steps, **runs.accuracies()}
    if names := probing.white_box(case):
        evidence["white_box"] = float(case.measured.over(names)[probe.rows].float().mean())
    otherwise = (
        f"PGD leaves {percent(evidence['pgd'])} of {len(probe.rows)} probe images standing, one step "
        f"{percent(evidence['fgsm'])}; a second run with twice the steps finds no more than chance would"
    )
    remarks = [*_one_step(case, runs), *_effort(case, runs), *_suite(case, probe, runs)]
    return *probing.gravest(remarks, otherwise), evidence


def _run(case: Case, probe: Stage) -> _Runs:
    ball, steps = case.terms.ball, case.probes.steps
    one = probing.survivors(case, probe, Fgsm(kind="fgsm"), ball, None)
    many = probing.survivors(case, probe, probing.plain_pgd(steps), ball, PURPOSE)
    more = probing.press(case, probe, many, probing.plain_pgd(2 * steps), ball, f"{PURPOSE}-again")
    return _Runs(one, many, more)


def _one_step(case: Case, runs: _Runs) -> list[Remark]:
    if probing.change(runs.many, runs.one, case).low <= 0:
        return []
    shares = runs.accuracies()
    sentence = f"one FGSM step leaves {percent(shares['fgsm'])} standing, PGD {percent(shares['pgd'])}"
    return [("fail", f"{sentence}: an attack that gets weaker with more steps follows masked gradients")]


def _effort(case: Case, runs: _Runs) -> list[Remark]:
    """A warning at most: whether the evaluation itself missed something is `_suite`'s question."""
    drop = probing.change(runs.many, runs.more, case)
    if drop.low <= 0:
        return []
    sentence = f"a second run with twice the steps takes {percent(drop.difference)} more of the images"
    return [("warn", f"{sentence}: PGD has not converged after {case.probes.steps} steps on this model")]


def _suite(case: Case, probe: Stage, runs: _Runs) -> list[Remark]:
    """What the probes found and the evaluation did not: its white-box attacks must not be weaker than these."""
    names = probing.white_box(case)
    climbing = [name for name in names if not isinstance(case.attacks[name], Fgsm)]
    remarks: list[Remark] = []
    lost = _missed(case, probe, climbing, runs.one)
    if lost and lost.low > 0:
        sentence = f"one FGSM step fools {percent(lost.difference)} more of the images than {', '.join(climbing)} did"
        remarks.append(("fail", f"{sentence}: these attacks are broken, too weak, or misled by masked gradients"))
    if missed := _missed(case, probe, names, runs.more):
        sentence = f"a plain PGD of {2 * case.probes.steps} steps fools {percent(missed.difference)} more of the images"
        sentence += f" than {', '.join(names)} did: the attacks tried were too weak"
        remarks.append((probing.found_more(missed), sentence))
    return remarks


def _missed(case: Case, probe: Stage, names: list[str], right_n: Tensor) -> Paired | None:
    """How much better the model did under these attacks than in a probe, on the images that were to meet both."""
    due_n = probing.due(case, names)[probe.rows]
    if not due_n.any():
        return None
    return probing.change(case.measured.over(names)[probe.rows][due_n], right_n[due_n], case)

"""Check 8: does the number that most papers print, PGD's, mislead on this model?

Never a failure: the headline is the worst case over all attacks anyway.

Shapes: N images of the evaluation.
"""

from torch import Tensor

from advmoe.attacks.pgd import Pgd
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import percent
from advmoe.statistics.decisions import CLEAN, WORST

MISLEADING = 0.05  # of the images


def pgd_gap(case: CheckContext) -> CheckResult:
    """Accuracy under PGD minus that under all attacks together."""
    return probe_attacks.run_check("pgd_gap", _answer, case)


def _answer(case: CheckContext) -> probe_attacks.Answer:
    name = _usual(case)
    outcome, correct = case.measured.outcomes[name], case.measured.correct
    due_N = probe_attacks.due(case, [name])
    early_N = due_N & correct[CLEAN] & ~outcome.attacked
    missed = int((due_N & outcome.correct & ~correct[WORST]).sum())
    gap = (missed + int(early_N.sum()) * _withstand(case, name, early_N)) / int(due_N.sum())
    worst = float(correct[WORST][due_N].double().mean())
    evidence = {"attack": name, "pgd": worst + gap, "worst": worst, "gap": gap, "fallen_before": int(early_N.sum())}
    sentence = f"accuracy is {percent(worst + gap)} under {name} and {percent(worst)} under all attacks together"
    if gap > MISLEADING:
        return "warn", f"{sentence}: PGD numbers of this model mislead, compare the worst case only", evidence
    return "pass", sentence, evidence


def _usual(case: CheckContext) -> str:
    """PGD as papers run it, untargeted on the cross-entropy; another PGD where there is none."""
    runs = {name: case.attacks[name] for name in case.measured.outcomes}
    found = {name: attack for name, attack in runs.items() if isinstance(attack, Pgd)}
    if not found:
        raise probe_attacks.CheckSkippedError("not checked", "PGD is not among the attacks")
    return min(found, key=lambda name: (found[name].targets > 0, found[name].loss != "ce"))


def _withstand(case: CheckContext, name: str, early_N: Tensor) -> float:
    """Images that fell to earlier attacks were spared PGD: the share of them, in a sample, that it would have left."""
    rows = early_N.nonzero().squeeze(1)[: case.probes.images]
    if not len(rows):
        return 0.0
    left = probe_attacks.survivors(case, probe_attacks.pick(case, rows), case.attacks[name], case.terms.ball, name)
    return float(left.float().mean())

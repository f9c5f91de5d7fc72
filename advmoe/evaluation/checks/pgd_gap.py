"""Check 8: does the number that most papers print, PGD's, mislead on this model?

Never a failure: the headline is the worst case over all attacks anyway.

Shapes: N images of the evaluation.
"""

from torch import Tensor

from advmoe.attacks.pgd import Pgd
from advmoe.evaluation.checks import probing
from advmoe.evaluation.checks.case import Case, Finding
from advmoe.evaluation.checks.probing import percent
from advmoe.evaluation.harness import CLEAN, WORST

MISLEADING = 0.05  # of the images


def pgd_gap(case: Case) -> Finding:
    """Accuracy under PGD minus that under all attacks together."""
    return probing.answered("pgd_gap", _answer, case)


def _answer(case: Case) -> probing.Answer:
    name = _usual(case)
    outcome, correct = case.measured.outcomes[name], case.measured.correct
    due_N = probing.due(case, [name])
    early_N = due_N & correct[CLEAN] & ~outcome.attacked
    missed = int((due_N & outcome.correct & ~correct[WORST]).sum())
    gap = (missed + int(early_N.sum()) * _withstand(case, name, early_N)) / int(due_N.sum())
    worst = float(correct[WORST][due_N].double().mean())
    evidence = {"attack": name, "pgd": worst + gap, "worst": worst, "gap": gap, "fallen_before": int(early_N.sum())}
    sentence = f"accuracy is {percent(worst + gap)} under {name} and {percent(worst)} under all attacks together"
    if gap > MISLEADING:
        return "warn", f"{sentence}: PGD numbers of this model mislead, compare the worst case only", evidence
    return "pass", sentence, evidence


def _usual(case: Case) -> str:
    """PGD as papers run it, untargeted on the cross-entropy; another PGD where there is none."""
    runs = {name: case.attacks[name] for name in case.measured.outcomes}
    found = {name: attack for name, attack in runs.items() if isinstance(attack, Pgd)}
    if not found:
        raise probing.UnaskableError("not checked", "PGD is not among the attacks")
    return min(found, key=lambda name: (found[name].targets > 0, found[name].loss != "ce"))


def _withstand(case: Case, name: str, early_N: Tensor) -> float:
    """Images that fell to earlier attacks were spared PGD: the share of them, in a sample, that it would have left."""
    rows = early_N.nonzero().squeeze(1)[: case.probes.images]
    if not len(rows):
        return 0.0
    left = probing.survivors(case, probing.pick(case, rows), case.attacks[name], case.terms.ball, name)
    return float(left.float().mean())

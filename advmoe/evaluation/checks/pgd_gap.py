"""Check 8, gap of PGD: accuracy under PGD alone is close to the worst case over all attacks.

At most a warning, as the headline is the worst case over all attacks.

Shapes: N images of the evaluation.
"""

from torch import Tensor

from advmoe.attacks.pgd import Pgd
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import percent
from advmoe.statistics.decisions import CLEAN, WORST

WARN_GAP = 0.05  # of the images


def pgd_gap(context: CheckContext) -> CheckResult:
    """Compares the accuracy under PGD with that under all attacks together."""
    return probe_attacks.run_check("pgd_gap", _check, context)


def _check(context: CheckContext) -> probe_attacks.CheckOutput:
    name = _standard_pgd(context)
    outcome, correct = context.result.outcomes[name], context.result.correct
    scheduled_N = probe_attacks.scheduled(context, [name])
    dropped_N = scheduled_N & correct[CLEAN] & ~outcome.attacked
    missed = int((scheduled_N & outcome.correct & ~correct[WORST]).sum())
    gap = (missed + int(dropped_N.sum()) * _survival_rate(context, name, dropped_N)) / int(scheduled_N.sum())
    worst = float(correct[WORST][scheduled_N].double().mean())
    evidence = {"attack": name, "pgd": worst + gap, "worst": worst, "gap": gap, "fallen_before": int(dropped_N.sum())}
    sentence = f"accuracy is {percent(worst + gap)} under {name} and {percent(worst)} under all attacks together"
    if gap > WARN_GAP:
        return "warn", f"{sentence}: accuracy under PGD is misleading, compare only the worst case", evidence
    return "pass", sentence, evidence


def _standard_pgd(context: CheckContext) -> str:
    """Returns the name of an untargeted PGD on the cross-entropy, as in most papers, else of another PGD."""
    runs = {name: context.attacks[name] for name in context.result.outcomes}
    pgd_attacks = {name: attack for name, attack in runs.items() if isinstance(attack, Pgd)}
    if not pgd_attacks:
        raise probe_attacks.CheckSkippedError("not checked", "PGD is not among the attacks")
    return min(pgd_attacks, key=lambda name: (pgd_attacks[name].targets > 0, pgd_attacks[name].loss != "ce"))


def _survival_rate(context: CheckContext, name: str, dropped_N: Tensor) -> float:
    """Returns the share that survives PGD, in a sample of the images that were dropped before PGD ran."""
    rows = dropped_N.nonzero().squeeze(1)[: context.settings.images]
    if not len(rows):
        return 0.0
    right_n = probe_attacks.survivors(
        context, probe_attacks.probe_at(context, rows), context.attacks[name], context.config.ball, name
    )
    return float(right_n.float().mean())

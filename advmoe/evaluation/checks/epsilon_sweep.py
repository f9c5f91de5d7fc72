"""Check 2: the larger the budget, the lower the accuracy, and without a limit nothing stands (Carlini et al. 2019).

Within half the pixel range lies plain grey for every image, so no classifier can be right about more than its largest
class there; within the whole range lies every other image. An attack on gradients that does not get there is blind.
Ascents start at the image itself: random starts alone would carry even a blind attack a long way at such radii. In L2
the two last balls are L-inf ones all the same, which the L2 balls of half and the whole diagonal of the box contain.

Shapes: n probe images.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from advmoe.attacks.ball import Ball, LInf
from advmoe.attacks.pgd import Pgd
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import ProbeSet, Remark, percent

HALF, WHOLE = LInf(0.5), LInf(1.0)
FACTORS = (0.5, 1.0, 2.0)  # of the threat model's epsilon
HARDER = 2  # times the steps, at less than half the step size, before a model is accused
AIMS = 3  # classes aimed at then
FEW = 2  # images that prove nothing, however few there are in all


def epsilon_sweep(case: CheckContext) -> CheckResult:
    """PGD on the margin around the threat model's radius; everything PGD has within half and all of the pixel range."""
    return probe_attacks.run_check("budget", _answer, case)


@dataclass(frozen=True, eq=False)
class _Level:
    """Who (n,) is still right within a ball."""

    ball: Ball
    right: Tensor

    @property
    def name(self) -> str:
        return f"{self.ball.norm} {self.ball.epsilon:.4g}"

    @property
    def share(self) -> float:
        return float(self.right.float().mean())


@dataclass(frozen=True, eq=False)
class _FarLevel(_Level):
    """`ce`: who (n,) is right after the ascent of the cross-entropy alone."""

    ce: Tensor


def _answer(case: CheckContext) -> probe_attacks.Answer:
    probe = probe_attacks.probe_images(case)
    predicted = case.measured.clean_logits.argmax(dim=1)
    if (predicted == predicted[0]).all():
        sentence = f"the model sees class {int(predicted[0])} in every image, so perhaps nothing can fool it"
        raise probe_attacks.CheckSkippedError("not checked", sentence)
    near = [_near(case, probe, ball) for ball in _balls(case.terms.ball, probe.images)]
    half, whole = (_far(case, probe, ball) for ball in (HALF, WHOLE))
    largest = float(probe.labels.bincount().max()) / len(probe.rows)
    levels = [*near, half, whole]
    remarks = [*_rises(case, levels), *_too_high(case, probe, {half: largest, whole: 0.0}), *_saturated(case, whole)]
    otherwise = (
        f"accuracy on {len(probe.rows)} probe images falls with epsilon to {percent(half.share)} within half the pixel "
        f"range (largest class {percent(largest)}) and {percent(whole.share)} within all of it"
    )
    evidence = {
        "images": len(probe.rows),
        "largest_class": largest,
        "accuracy": {level.name: level.share for level in levels},
        "cross_entropy_alone": {level.name: float(level.ce.float().mean()) for level in (half, whole)},
    }
    return *probe_attacks.worst_status(remarks, otherwise), evidence


def _balls(ball: Ball, images_nCHW: Tensor) -> list[Ball]:
    """Around the threat model's own, in its norm, the L-inf ones below half the pixel range."""
    radii = {factor * ball.epsilon for factor in FACTORS}
    if ball.norm == "linf":
        radii = {radius for radius in radii if radius < HALF.epsilon}
    else:
        radii = {min(radius, images_nCHW[0].numel() ** 0.5) for radius in radii}
    return [ball.resized(radius) for radius in sorted(radii)]


def _near(case: CheckContext, probe: ProbeSet, ball: Ball) -> _Level:
    """One ascent each: here levels are only compared with one another."""
    right = probe_attacks.survivors(case, probe, probe_attacks.plain_pgd(case.probes.steps, "margin"), ball, None)
    return _Level(ball, right)


def _far(case: CheckContext, probe: ProbeSet, ball: Ball) -> _FarLevel:
    """Cross-entropy, then the margin, then small steps towards several classes: nobody is accused for bad luck."""
    steps = case.probes.steps
    ce = probe_attacks.survivors(case, probe, probe_attacks.plain_pgd(steps), ball, None)
    fine = Pgd(kind="pgd", steps=HARDER * steps, step_size=0.1, restarts=1, loss="margin", targets=AIMS)
    right = ce
    for attack in (probe_attacks.plain_pgd(steps, "margin"), fine):
        right = probe_attacks.attack_survivors(case, probe, right, attack, ball, None)
    return _FarLevel(ball, right, ce)


def _rises(case: CheckContext, levels: list[_Level]) -> list[Remark]:
    remarks: list[Remark] = []
    for inner, outer in pairwise(levels):
        if inner.ball.epsilon > outer.ball.epsilon:  # not one inside the other: L2 beyond half the pixel range
            continue
        rise = probe_attacks.change(outer.right, inner.right, case)
        sentence = f"accuracy rises with epsilon, from {percent(inner.share)} ({inner.name}) to {percent(outer.share)}"
        remarks.append((probe_attacks.found_more(rise), f"{sentence} ({outer.name}): the gradients mislead the attack"))
    return remarks


def _too_high(case: CheckContext, probe: ProbeSet, limits: dict[_Level, float]) -> list[Remark]:
    """`limits`: the share of the images that can truly stand within a ball."""
    excess = {level: level.share - limit for level, limit in limits.items() if level.share > limit}
    if not excess:
        return []
    shares = [f"{percent(level.share)} at epsilon {level.ball.epsilon:g}" for level in excess]
    true = [percent(limits[level]) for level in excess]
    sentence = f"PGD leaves {' and '.join(shares)} standing where {' and '.join(true)} at most can stand"
    strong = any(more > probe_attacks.LARGE and more * len(probe.rows) > FEW for more in excess.values())
    return [("fail" if strong else "warn", f"{sentence}: {_cause(case, probe)}")]


def _cause(case: CheckContext, probe: ProbeSet) -> str:
    fault = probe_attacks.gradient_fault(case, probe, "margin")
    if "zero" in fault:
        return f"{fault}, as when the input is rounded, quantised or thresholded"
    return fault or "masked gradients, which exist but do not lead to the boundary"


def _saturated(case: CheckContext, whole: _FarLevel) -> list[Remark]:
    """The margin's gradient may work where that of the cross-entropy has vanished."""
    stuck = whole.ce & ~whole.right
    if stuck.sum() <= max(FEW, probe_attacks.LARGE * len(stuck)):
        return []
    sentence = (
        f"{percent(float(stuck.float().mean()))} of the probe images stand PGD on the cross-entropy with epsilon 1 "
        "and fall to the margin: the output is saturated (very large logits), so cross-entropy gradients are masked"
    )
    if probe_attacks.rests_on_cross_entropy(case):
        return [("fail", f"{sentence}, and every white-box attack here follows them")]
    return [("warn", sentence)]

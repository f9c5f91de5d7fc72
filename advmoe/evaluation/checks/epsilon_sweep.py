"""Check 2, epsilon sweep: accuracy falls with epsilon, and to 0 at unbounded epsilon (Carlini et al. 2019).

Half the pixel range contains plain grey for every image, so the accuracy there is at most the share of the largest
class; the full range contains every other image. A gradient-based attack that stays above these values is misled.
Ascents start at the image itself, because random starts alone go far at such radii. In L2 the two largest balls are
L-inf balls too; the L2 balls of half and the full diagonal of the box contain them.

Shapes: n probe images.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from advmoe.attacks.ball import Ball, LInf
from advmoe.attacks.pgd import Pgd
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import Issue, ProbeSet, percent

HALF_RANGE, FULL_RANGE = LInf(0.5), LInf(1.0)
EPSILON_FACTORS = (0.5, 1.0, 2.0)  # of the threat model's epsilon
EXTRA_STEPS_FACTOR = 2  # times the steps, at less than half the step size, before the check fails
TARGET_CLASSES = 3  # classes targeted then
NEGLIGIBLE_COUNT = 2  # images: as few are never significant


def epsilon_sweep(context: CheckContext) -> CheckResult:
    """Runs PGD around the threat model's radius, and stronger PGD with half and the full pixel range."""
    return probe_attacks.run_check("budget", _check, context)


@dataclass(frozen=True, eq=False)
class _Level:
    """`right` (n,) bool: correctly classified after an attack within `ball`."""

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
    """`ce` (n,) bool: correctly classified after the ascent of the cross-entropy alone."""

    ce: Tensor


def _check(context: CheckContext) -> probe_attacks.CheckOutput:
    probe = probe_attacks.probe_images(context)
    predicted = context.result.clean_logits.argmax(dim=1)
    if (predicted == predicted[0]).all():
        sentence = f"the model predicts class {int(predicted[0])} for every image, so it may be constant"
        raise probe_attacks.CheckSkippedError("not checked", sentence)
    small = [_near_level(context, probe, ball) for ball in _balls(context.config.ball, probe.images)]
    half, full = (_far_level(context, probe, ball) for ball in (HALF_RANGE, FULL_RANGE))
    largest = float(probe.labels.bincount().max()) / len(probe.rows)
    levels = [*small, half, full]
    issues = [
        *_rise_issues(context, levels),
        *_excess_issues(context, probe, {half: largest, full: 0.0}),
        *_saturation_issues(context, full),
    ]
    passed = (
        f"accuracy on {len(probe.rows)} probe images falls with epsilon to {percent(half.share)} within half the pixel "
        f"range (largest class {percent(largest)}) and {percent(full.share)} within the full range"
    )
    evidence = {
        "images": len(probe.rows),
        "largest_class": largest,
        "accuracy": {level.name: level.share for level in levels},
        "cross_entropy_alone": {level.name: float(level.ce.float().mean()) for level in (half, full)},
    }
    return *probe_attacks.worst_status(issues, passed), evidence


def _balls(ball: Ball, images_nCHW: Tensor) -> list[Ball]:
    """Returns balls around the threat model's radius, in its norm; L-inf radii stay below half the pixel range."""
    radii = {factor * ball.epsilon for factor in EPSILON_FACTORS}
    if ball.norm == "linf":
        radii = {radius for radius in radii if radius < HALF_RANGE.epsilon}
    else:
        radii = {min(radius, images_nCHW[0].numel() ** 0.5) for radius in radii}
    return [ball.resized(radius) for radius in sorted(radii)]


def _near_level(context: CheckContext, probe: ProbeSet, ball: Ball) -> _Level:
    """One ascent: these levels are only compared with one another."""
    right = probe_attacks.survivors(
        context, probe, probe_attacks.plain_pgd(context.settings.steps, "margin"), ball, None
    )
    return _Level(ball, right)


def _far_level(context: CheckContext, probe: ProbeSet, ball: Ball) -> _FarLevel:
    """Attacks with the cross-entropy, the survivors with the margin, then with small steps to several classes."""
    steps = context.settings.steps
    ce = probe_attacks.survivors(context, probe, probe_attacks.plain_pgd(steps), ball, None)
    small_steps = Pgd(
        kind="pgd", steps=EXTRA_STEPS_FACTOR * steps, step_size=0.1, restarts=1, loss="margin", targets=TARGET_CLASSES
    )
    right = ce
    for attack in (probe_attacks.plain_pgd(steps, "margin"), small_steps):
        right = probe_attacks.attack_survivors(context, probe, right, attack, ball, None)
    return _FarLevel(ball, right, ce)


def _rise_issues(context: CheckContext, levels: list[_Level]) -> list[Issue]:
    issues: list[Issue] = []
    for inner, outer in pairwise(levels):
        if inner.ball.epsilon > outer.ball.epsilon:  # not nested: an L2 ball beyond half the pixel range
            continue
        rise = probe_attacks.paired_difference(outer.right, inner.right, context)
        sentence = f"accuracy rises with epsilon, from {percent(inner.share)} ({inner.name}) to {percent(outer.share)}"
        issues.append((probe_attacks.drop_status(rise), f"{sentence} ({outer.name}): the gradients mislead the attack"))
    return issues


def _excess_issues(context: CheckContext, probe: ProbeSet, limits: dict[_Level, float]) -> list[Issue]:
    """`limits`: the highest possible accuracy within a ball."""
    excess = {level: level.share - limit for level, limit in limits.items() if level.share > limit}
    if not excess:
        return []
    shares = [f"{percent(level.share)} at epsilon {level.ball.epsilon:g}" for level in excess]
    highest = [percent(limits[level]) for level in excess]
    sentence = f"accuracy under PGD is {' and '.join(shares)} where at most {' and '.join(highest)} are possible"
    significant = any(
        excess_share > probe_attacks.LARGE_DROP and excess_share * len(probe.rows) > NEGLIGIBLE_COUNT
        for excess_share in excess.values()
    )
    return [("fail" if significant else "warn", f"{sentence}: {_cause(context, probe)}")]


def _cause(context: CheckContext, probe: ProbeSet) -> str:
    fault = probe_attacks.gradient_fault(context, probe, "margin")
    if "zero" in fault:
        return f"{fault}, as when the input is rounded, quantised or thresholded"
    return fault or "masked gradients, which exist but do not lead to the boundary"


def _saturation_issues(context: CheckContext, full: _FarLevel) -> list[Issue]:
    """Images on which the gradient of the margin works and that of the cross-entropy has vanished."""
    stuck = full.ce & ~full.right
    if stuck.sum() <= max(NEGLIGIBLE_COUNT, probe_attacks.LARGE_DROP * len(stuck)):
        return []
    sentence = (
        f"{percent(float(stuck.float().mean()))} of the probe images survive PGD on the cross-entropy with epsilon 1 "
        "but not on the margin: the output is saturated (very large logits), so cross-entropy gradients are masked"
    )
    if probe_attacks.relies_on_cross_entropy(context):
        return [("fail", f"{sentence}, and every white-box attack of the evaluation follows them")]
    return [("warn", sentence)]

"""Check 7, loss increase: attacks raise the loss, and several kinds of attacks are run.

Carlini et al. 2019, arXiv 1902.06705. The loss must rise during an ascent; the evaluation must include a targeted and
an untargeted attack, and one that adversarial training does not use; no attack may leave all pixels unchanged.

Shapes: N images of the evaluation, n probe images, T points of an ascent.
"""

import torch
from torch import Tensor

from advmoe.attacks.apgd import ApgdT
from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.fab import FabT
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.interface import IsAdversarial, Loss, Model, margin
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.registry import AttackSettings
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import Issue, ProbeSet, percent
from advmoe.evaluation.harness import bind_attack

LOSSES: tuple[Loss, ...] = ("ce", "margin")
PASS_SHARE = 0.9  # share of images whose loss rises from which the check passes
FAIL_SHARE = 0.5  # and below which it fails
TRACED_IMAGES = 25  # probe images of the ascents; enough to measure a share near PASS_SHARE
UNBOUNDED_IMAGES = 8  # images on which an attack that changed nothing is run with unbounded epsilon
LOSS_NAMES: dict[Loss, str] = {"ce": "cross-entropy", "margin": "margin"}


def loss_increase(context: CheckContext) -> CheckResult:
    """Checks that the loss rises, that there are several kinds of attacks, and that each changes pixels."""
    return probe_attacks.run_check("progress", _check, context)


def _check(context: CheckContext) -> probe_attacks.CheckOutput:
    probe = probe_attacks.probe_images(context)
    traced = probe.first(TRACED_IMAGES)
    curves = {loss: _margin_curve(context, traced, loss) for loss in LOSSES}
    rising = {loss: float((curve_Tn[-1] > curve_Tn[0]).float().mean()) for loss, curve_Tn in curves.items()}
    idle = _idle_attacks(context, probe)
    issues = [*_rise_issues(context, traced, rising), *_variety_issues(context), *_idle_issues(context, idle)]
    passed = (
        f"the loss rises on {percent(min(rising.values()))} of {len(traced.rows)} probe images; targeted and "
        "untargeted attacks were run, and at least one that adversarial training does not use"
    )
    evidence = {
        "images": len(traced.rows),
        "rising": rising,
        "margin": {loss: _summary(curve_Tn) for loss, curve_Tn in curves.items()},
        "idle": idle,
    }
    return *probe_attacks.worst_status(issues, passed), evidence


def _margin_curve(context: CheckContext, probe: ProbeSet, loss: Loss) -> Tensor:
    """Returns the margin (T, n) along an ascent of `loss` that starts at the images themselves."""
    curves: list[Tensor] = []

    def attack_fn(
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        /,
        *,
        ball: Ball,
        draws: RandomStream,
        is_adversarial: IsAdversarial | None = None,
    ) -> Tensor:
        del is_adversarial  # every image takes all steps
        margins: list[Tensor] = []

        def recorded(points: Tensor) -> Tensor:
            logits = model(points)
            margins.append(margin(logits.detach(), labels_B).cpu())
            return logits

        settings = probe_attacks.plain_pgd(context.settings.steps, loss)
        found = pgd(recorded, images_BCHW, labels_B, ball=ball, settings=settings, draws=draws)
        with torch.no_grad():
            recorded(found)
        curves.append(torch.stack(margins))
        return found

    probe_attacks.attacked_images(context, probe, attack_fn, context.config.ball, None)
    return torch.cat(curves, dim=1)


def _summary(curve_Tn: Tensor) -> dict[str, float]:
    means = curve_Tn.double().mean(dim=1)
    return {"start": float(means[0]), "middle": float(means[len(means) // 2]), "end": float(means[-1])}


def _rise_issues(context: CheckContext, probe: ProbeSet, rising: dict[Loss, float]) -> list[Issue]:
    """A failed ascent fails the check if every white-box attack uses its loss, or if no ascent succeeds."""
    fatal = max(rising.values()) < FAIL_SHARE
    issues: list[Issue] = []
    for loss, share in rising.items():
        if share >= PASS_SHARE:
            continue
        only_loss = loss == "ce" and probe_attacks.relies_on_cross_entropy(context)
        sentence = f"PGD on the {LOSS_NAMES[loss]} raises the loss on only {percent(share)} of the probe images"
        cause = probe_attacks.gradient_fault(context, probe, loss) or "the gradient is masked or flat"
        issues.append(("fail" if fatal or (only_loss and share < FAIL_SHARE) else "warn", f"{sentence}: {cause}"))
    return issues


def _variety_issues(context: CheckContext) -> list[Issue]:
    attacks = list(context.attacks.values())
    issues: list[Issue] = []
    two_classes = context.result.clean_logits.shape[1] == 2  # the one wrong class is always the target
    if not two_classes and not any(map(_targeted, attacks)):
        issues.append(("warn", "no targeted attack was run (pgd with targets, apgd-t, fab-t)"))
    if not any(map(_untargeted, attacks)):
        issues.append(("warn", "no untargeted attack was run (pgd, apgd-ce, square, ...)"))
    if all(map(_common_in_training, attacks)):
        issues.append(("warn", "only attacks that adversarial training uses (fgsm, pgd) or noise were run"))
    return issues


def _targeted(attack: AttackSettings) -> bool:
    return isinstance(attack, ApgdT | FabT) or (isinstance(attack, Pgd) and attack.targets > 0)


def _untargeted(attack: AttackSettings) -> bool:
    return not _targeted(attack) and probe_attacks.access(attack) not in ("none", "own")


def _common_in_training(attack: AttackSettings) -> bool:
    plain = isinstance(attack, Pgd) and attack.loss == "ce" and not attack.targets
    return plain or isinstance(attack, Fgsm | Noise)


def _idle_attacks(context: CheckContext, probe: ProbeSet) -> list[str]:
    """Returns attacks with surviving images that changed no pixel of any image, nor with unbounded epsilon."""
    return [
        name
        for name in context.result.outcomes
        if _changed_no_pixel(context, name) and _idle_when_unbounded(context, probe, name)
    ]


def _changed_no_pixel(context: CheckContext, name: str) -> bool:
    outcome = context.result.outcomes[name]
    attacked_N = outcome.attacked
    same = torch.equal(outcome.images[attacked_N], context.target.images.cpu()[attacked_N])
    return same and bool((attacked_N & outcome.correct).any())


def _idle_when_unbounded(context: CheckContext, probe: ProbeSet, name: str) -> bool:
    """Minimum-norm attacks may return an image unchanged if the decision boundary is outside the ball."""
    unbounded_probe, ball = probe.first(UNBOUNDED_IMAGES), _unbounded(context.config.ball, probe)
    with bind_attack(context.target, context.attacks[name], context.config.precision) as attack_fn:
        return torch.equal(
            probe_attacks.attacked_images(context, unbounded_probe, attack_fn, ball, name), unbounded_probe.images
        )


def _unbounded(ball: Ball, probe: ProbeSet) -> Ball:
    return ball.resized(1.0 if ball.norm == "linf" else probe.images[0].numel() ** 0.5)


def _idle_issues(context: CheckContext, idle: list[str]) -> list[Issue]:
    return [
        ("fail", f"{name} has no effect: it changed no pixel of any image, {_idle_cause(context.attacks[name])}")
        for name in idle
    ]


def _idle_cause(attack: AttackSettings) -> str:
    if probe_attacks.access(attack) == "white":
        return "as if its gradients were masked to zero"
    return "so it does not test the model"

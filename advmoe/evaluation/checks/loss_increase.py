"""Check 7: the attacks get somewhere, and they are of more than one kind (Carlini et al. 2019, arXiv 1902.06705).

The loss must rise on the way; a targeted and an untargeted attack must have been tried, and one that training did not
use; and an attack that changes no pixel while images stand was none.

Shapes: N images of the evaluation, n probe images, T points of an ascent.
"""

import torch
from torch import Tensor

from advmoe.attacks.apgd import ApgdT
from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.fab import FabT
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.interface import IsAdversarial, Loss, Model, margin
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.registry import AnyAttack
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import ProbeSet, Remark, percent
from advmoe.evaluation.harness import bound

LOSSES: tuple[Loss, ...] = ("ce", "margin")
NEARLY_ALL, HALF = 0.9, 0.5  # of the images, whose loss a sound ascent raises
CLIMBERS = 25  # probe images whose way up is watched, to the last step each: enough for a share of nearly all
EASY = 8  # images on which an attack that seems idle is tried without a limit
NAMES: dict[Loss, str] = {"ce": "cross-entropy", "margin": "margin"}


def loss_increase(case: CheckContext) -> CheckResult:
    """Does the loss rise, are the attacks of several kinds, and does each of them do something?"""
    return probe_attacks.run_check("progress", _answer, case)


def _answer(case: CheckContext) -> probe_attacks.Answer:
    probe = probe_attacks.probe_images(case)
    climbers = probe.first(CLIMBERS)
    curves = {loss: _curve(case, climbers, loss) for loss in LOSSES}
    rising = {loss: float((curve_Tn[-1] > curve_Tn[0]).float().mean()) for loss, curve_Tn in curves.items()}
    idle = _idle(case, probe)
    remarks = [*_rise(case, climbers, rising), *_kinds(case), *_idle_remarks(case, idle)]
    otherwise = (
        f"the loss rises on {percent(min(rising.values()))} of {len(climbers.rows)} probe images; targeted and "
        "untargeted attacks were tried, and one at least that is not what models are trained on"
    )
    evidence = {
        "images": len(climbers.rows),
        "rising": rising,
        "margin": {loss: _summary(curve_Tn) for loss, curve_Tn in curves.items()},
        "idle": idle,
    }
    return *probe_attacks.worst_status(remarks, otherwise), evidence


def _curve(case: CheckContext, probe: ProbeSet, loss: Loss) -> Tensor:
    """The margin (T, n) along an ascent of `loss` that starts at the images themselves."""
    curves: list[Tensor] = []

    def craft(
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        /,
        *,
        ball: Ball,
        draws: Draws,
        fooled: IsAdversarial | None = None,
    ) -> Tensor:
        del fooled  # every image takes all steps
        margins: list[Tensor] = []

        def watched(points: Tensor) -> Tensor:
            logits = model(points)
            margins.append(margin(logits.detach(), labels_B).cpu())
            return logits

        settings = probe_attacks.plain_pgd(case.probes.steps, loss)
        found = pgd(watched, images_BCHW, labels_B, ball=ball, settings=settings, draws=draws)
        with torch.no_grad():
            watched(found)
        curves.append(torch.stack(margins))
        return found

    probe_attacks.attacked_images(case, probe, craft, case.terms.ball, None)
    return torch.cat(curves, dim=1)


def _summary(curve_Tn: Tensor) -> dict[str, float]:
    means = curve_Tn.double().mean(dim=1)
    return {"start": float(means[0]), "middle": float(means[len(means) // 2]), "end": float(means[-1])}


def _rise(case: CheckContext, probe: ProbeSet, rising: dict[Loss, float]) -> list[Remark]:
    """An ascent that fails is fatal where every white-box attack is of its kind, or where none succeeds."""
    fatal = max(rising.values()) < HALF
    remarks: list[Remark] = []
    for loss, share in rising.items():
        if share >= NEARLY_ALL:
            continue
        alone = loss == "ce" and probe_attacks.rests_on_cross_entropy(case)
        sentence = f"PGD on the {NAMES[loss]} raises the loss on {percent(share)} of the probe images only"
        cause = (
            probe_attacks.gradient_fault(case, probe, loss)
            or "the gradient is masked, or so flat that it leads nowhere"
        )
        remarks.append(("fail" if fatal or (alone and share < HALF) else "warn", f"{sentence}: {cause}"))
    return remarks


def _kinds(case: CheckContext) -> list[Remark]:
    attacks = list(case.attacks.values())
    remarks: list[Remark] = []
    two_classes = case.measured.clean_logits.shape[1] == 2  # there the one wrong class is always the target
    if not two_classes and not any(map(_targeted, attacks)):
        remarks.append(("warn", "no targeted attack was tried (pgd with targets, apgd-t, fab-t)"))
    if not any(map(_untargeted, attacks)):
        remarks.append(("warn", "no untargeted attack was tried (pgd, apgd-ce, square, ...)"))
    if all(map(_customary, attacks)):
        remarks.append(("warn", "only attacks were tried that adversarial training itself uses (fgsm, pgd) or noise"))
    return remarks


def _targeted(attack: AnyAttack) -> bool:
    return isinstance(attack, ApgdT | FabT) or (isinstance(attack, Pgd) and attack.targets > 0)


def _untargeted(attack: AnyAttack) -> bool:
    return not _targeted(attack) and probe_attacks.access(attack) not in ("none", "own")


def _customary(attack: AnyAttack) -> bool:
    plain = isinstance(attack, Pgd) and attack.loss == "ce" and not attack.targets
    return plain or isinstance(attack, Fgsm | Noise)


def _idle(case: CheckContext, probe: ProbeSet) -> list[str]:
    """Attacks that left images standing and changed no pixel of any, not even where anything was allowed them."""
    return [name for name in case.measured.outcomes if _moved_nothing(case, name) and _lame(case, probe, name)]


def _moved_nothing(case: CheckContext, name: str) -> bool:
    outcome = case.measured.outcomes[name]
    met_N = outcome.attacked
    same = torch.equal(outcome.images[met_N], case.target.images.cpu()[met_N])
    return same and bool((met_N & outcome.correct).any())


def _lame(case: CheckContext, probe: ProbeSet, name: str) -> bool:
    """Attacks that look for the nearest boundary may rightly give back an image whose boundary is out of reach."""
    easy, ball = probe.first(EASY), _limitless(case.terms.ball, probe)
    with bound(case.target, case.attacks[name], case.terms.precision) as craft:
        return torch.equal(probe_attacks.attacked_images(case, easy, craft, ball, name), easy.images)


def _limitless(ball: Ball, probe: ProbeSet) -> Ball:
    return ball.resized(1.0 if ball.norm == "linf" else probe.images[0].numel() ** 0.5)


def _idle_remarks(case: CheckContext, idle: list[str]) -> list[Remark]:
    return [
        ("fail", f"{name} does nothing: it changed no pixel of any image, {_why(case.attacks[name])}") for name in idle
    ]


def _why(attack: AnyAttack) -> str:
    if probe_attacks.access(attack) == "white":
        return "as an attack does whose gradients are masked to zero"
    return "so it proves nothing about the model"

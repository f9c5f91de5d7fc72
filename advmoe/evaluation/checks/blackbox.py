"""Check 3, black-box attacks: they fool the model on no more images than white-box attacks do.

Athalye et al. 2018, arXiv 1802.00420. An image that a score-based, decision-based, transfer or noise attack fools and
that all white-box attacks fail on indicates masked gradients or weak white-box attacks. A few such images are expected.

Shapes: N images of the evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.fgsm import Fgsm
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Status

GRADIENT_FREE_ACCESS = ("score", "decision", "transfer", "none")
ALLOWED_SHARE = 0.005  # of the images that only gradient-free attacks may fool
ALLOWED_COUNT = 2  # images, however small the share
FAIL_FACTOR = 5  # times the allowed number from which the check fails


def blackbox(context: CheckContext) -> CheckResult:
    """Counts the images that only gradient-free attacks fool."""
    return probe_attacks.run_check("blackbox", _check, context)


def _check(context: CheckContext) -> probe_attacks.CheckOutput:
    white = probe_attacks.white_box(context)
    gradient_free = [
        name for name in context.result.outcomes if probe_attacks.access(context.attacks[name]) in GRADIENT_FREE_ACCESS
    ]
    if not white or not gradient_free:
        missing = "a black-box, transfer or noise attack" if white else "a white-box attack"
        raise probe_attacks.CheckSkippedError("not checked", f"{missing} is missing, so there is nothing to compare")
    only_gradient_free = _misclassified(context, gradient_free) & ~_misclassified(context, white)
    attacked = _attacked_by_all(context, white)
    added, undecided = int((only_gradient_free & attacked).sum()), int((only_gradient_free & ~attacked).sum())
    images = max(context.result.outcomes[name].limit for name in gradient_free)
    allowed = max(ALLOWED_SHARE * images, ALLOWED_COUNT)
    evidence: dict[str, Any] = {
        "images": images,
        "added": added,
        "allowed": allowed,
        "not_met_by_all_white_box": undecided,
    }
    evidence["by"] = {
        name: int((_misclassified(context, [name]) & only_gradient_free & attacked).sum()) for name in gradient_free
    }
    status = _status(added, undecided, allowed)
    return status, _sentence(context, status, white, gradient_free, evidence), evidence


def _misclassified(context: CheckContext, names: Sequence[str]) -> Tensor:
    outcomes = [context.result.outcomes[name] for name in names]
    return torch.stack([outcome.attacked & ~outcome.correct for outcome in outcomes]).any(dim=0)


def _attacked_by_all(context: CheckContext, names: Sequence[str]) -> Tensor:
    """Images (N,) bool that all of these attacks attacked: neither dropped before nor beyond a limit."""
    return torch.stack([context.result.outcomes[name].attacked for name in names]).all(dim=0)


def _status(added: int, undecided: int, allowed: float) -> Status:
    if added > FAIL_FACTOR * allowed:
        return "fail"
    if added > allowed:
        return "warn"
    return "not checked" if undecided > allowed else "pass"


def _sentence(
    context: CheckContext, status: Status, white: list[str], gradient_free: list[str], evidence: dict[str, Any]
) -> str:
    sentence = (
        f"of {evidence['images']} images, {evidence['added']} survive {', '.join(white)} but not "
        f"{', '.join(gradient_free)}; up to {evidence['allowed']:g} are expected by chance"
    )
    if status == "not checked":
        count = f"{', '.join(gradient_free)} fooled the model on {evidence['not_met_by_all_white_box']} images"
        return f"{count} that not every white-box attack was run on: run white-box attacks first, and on all images"
    if status == "pass":
        return sentence
    if all(isinstance(context.attacks[name], Fgsm) for name in white):
        return f"{sentence}: one step is too weak a white-box attack"
    return f"{sentence}: masked gradients, or white-box attacks that are too weak"

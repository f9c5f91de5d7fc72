"""Check 3: who sees the gradients should find what anybody finds (Athalye et al. 2018, arXiv 1802.00420).

An image that falls to queries, to decisions, to transfer or to noise, though no white-box attack could fool the model
on it, says that the gradients hide something or that the white-box attacks were weak. A few such images are ordinary.

Shapes: N images of the evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.fgsm import Fgsm
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Status

BLIND = ("score", "decision", "transfer", "none")
POINTS, FEW = 0.005, 2  # share of the images, and how many at least, that the blind attacks may add
MUCH = 5  # times what they may add is no accident


def blackbox(case: CheckContext) -> CheckResult:
    """What attacks without gradients add to what white-box attacks found."""
    return probe_attacks.run_check("blackbox", _answer, case)


def _answer(case: CheckContext) -> probe_attacks.Answer:
    white = probe_attacks.white_box(case)
    blind = [name for name in case.measured.outcomes if probe_attacks.access(case.attacks[name]) in BLIND]
    if not white or not blind:
        missing = "a black-box, transfer or noise attack" if white else "a white-box attack"
        raise probe_attacks.CheckSkippedError(
            "not checked", f"without {missing} among the attacks there is nothing to compare"
        )
    extra = _fallen(case, blind) & ~_fallen(case, white)
    judged = _met(case, white)
    added, unjudged = int((extra & judged).sum()), int((extra & ~judged).sum())
    images = max(case.measured.outcomes[name].limit for name in blind)
    allowed = max(POINTS * images, FEW)
    evidence: dict[str, Any] = {
        "images": images,
        "added": added,
        "allowed": allowed,
        "not_met_by_all_white_box": unjudged,
    }
    evidence["by"] = {name: int((_fallen(case, [name]) & extra & judged).sum()) for name in blind}
    status = _status(added, unjudged, allowed)
    return status, _sentence(case, status, white, blind, evidence), evidence


def _fallen(case: CheckContext, names: Sequence[str]) -> Tensor:
    outcomes = [case.measured.outcomes[name] for name in names]
    return torch.stack([outcome.attacked & ~outcome.correct for outcome in outcomes]).any(dim=0)


def _met(case: CheckContext, names: Sequence[str]) -> Tensor:
    """Who (N,) met all of these attacks: not an image that had fallen before and was dropped, or beyond a limit."""
    return torch.stack([case.measured.outcomes[name].attacked for name in names]).all(dim=0)


def _status(added: int, unjudged: int, allowed: float) -> Status:
    if added > MUCH * allowed:
        return "fail"
    if added > allowed:
        return "warn"
    return "not checked" if unjudged > allowed else "pass"


def _sentence(case: CheckContext, status: Status, white: list[str], blind: list[str], evidence: dict[str, Any]) -> str:
    sentence = (
        f"of {evidence['images']} images {evidence['added']} withstood {', '.join(white)} and fell to "
        f"{', '.join(blind)}; up to {evidence['allowed']:g} may do so by chance"
    )
    if status == "not checked":
        fallen = f"{evidence['not_met_by_all_white_box']} images fell to {', '.join(blind)}"
        return f"{fallen}, but not every white-box attack met them: run those first, and on all images"
    if status == "pass":
        return sentence
    if all(isinstance(case.attacks[name], Fgsm) for name in white):
        return f"{sentence}: one step is too weak a white-box attack"
    return f"{sentence}: masked gradients, or white-box attacks that are too weak"

"""What checks share that attack a model again: the images they attack, one attack on them, and how an answer is made.

Shapes: N images of the evaluation, n probe images, C channel, H/W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks import engine, registry
from advmoe.attacks.apgd import ApgdCe
from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting
from advmoe.attacks.interface import AttackFn, IsAdversarial, Loss, Model, input_gradient
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import ImageDraws
from advmoe.attacks.registry import Access, AnyAttack
from advmoe.core.errors import first_line
from advmoe.evaluation.batch_size import fitting_batch, in_batches, is_out_of_memory
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Status
from advmoe.evaluation.harness import DECISION_BATCH, bound
from advmoe.models import inference
from advmoe.statistics.paired_tests import PairedDifference, compare

STEP_SIZE = 0.25  # of epsilon, customary for PGD; with 20 steps five times the radius
LARGE = 0.1  # of the images: a drop, beyond its interval, that no honest evaluation shows
DIGITS = 6
GRAVITY: tuple[Status, ...] = ("not checked", "warn", "fail")

Answer = tuple[Status, str, dict[str, Any]]
Remark = tuple[Status, str]


class CheckSkippedError(Exception):
    """A check ends here, with this status and this sentence."""

    def __init__(self, status: Status, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def run_check(check: str, ask: Callable[[CheckContext], Answer], case: CheckContext) -> CheckResult:
    """The finding of one check, an early end included; numbers of the evidence rounded."""
    try:
        status, sentence, evidence = ask(case)
    except CheckSkippedError as stop:
        status, sentence, evidence = stop.status, stop.sentence, {}
    return CheckResult(check, status, sentence, _rounded(evidence))


def error_message(error: Exception) -> str:
    """What somebody's model or attack raised, in words; raised again where it is that memory ran out."""
    if is_out_of_memory(error):
        raise error
    return first_line(error)


def worst_status(remarks: Sequence[Remark], otherwise: str) -> Remark:
    """The worst status among the remarks with all sentences of that status; a pass with `otherwise` without any."""
    for status in reversed(GRAVITY):
        sentences = [sentence for found, sentence in remarks if found == status]
        if sentences:
            return status, "; ".join(sentences)
    return "pass", otherwise


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, DIGITS)
        case Mapping():
            return {str(key): _rounded(part) for key, part in value.items()}
        case list() | tuple():
            return [_rounded(part) for part in value]
    return value


def percent(share: float) -> str:
    """0.123 -> '12.3 %'."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class ProbeSet:
    """Probe images (n, C, H, W), their labels (n,), and on the CPU their positions (n,) in the evaluation."""

    images: Tensor
    labels: Tensor
    rows: Tensor

    def part(self, chosen_n: Tensor) -> "ProbeSet":
        """The images where `chosen` (n,) is true."""
        here = chosen_n.to(self.images.device)
        return ProbeSet(self.images[here], self.labels[here], self.rows[chosen_n.cpu()])

    def first(self, count: int) -> "ProbeSet":
        """The first images."""
        return ProbeSet(self.images[:count], self.labels[:count], self.rows[:count])


def probe_images(case: CheckContext) -> ProbeSet:
    """The first images that are right when clean, as many as the probes may have. Stops where there is none."""
    right_N = case.measured.clean_logits.argmax(dim=1) == case.measured.labels
    rows = right_N.nonzero().squeeze(1)[: case.probes.images]
    if not len(rows):
        raise CheckSkippedError(
            "not checked", "the model classifies no clean image correctly, so there is nothing to attack"
        )
    return pick(case, rows)


def pick(case: CheckContext, rows: Tensor) -> ProbeSet:
    """The images at the given positions (n,) of the evaluation."""
    here = rows.to(case.target.images.device)
    return ProbeSet(case.target.images[here], case.target.labels[here], rows)


class NoRandomness:
    """No randomness at all: an ascent starts at the image itself, and only its gradients can carry it away."""

    def uniform(self, like: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(like)

    def normal(self, like: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(like)

    def pick(self, rows: Tensor) -> "NoRandomness":
        """There are no streams to choose from."""
        del rows
        return self


def plain_pgd(steps: int, loss: Loss = "ce", targets: int = 0) -> Pgd:
    """One run of PGD with the usual step size."""
    return Pgd(kind="pgd", steps=steps, step_size=STEP_SIZE, restarts=1, loss=loss, targets=targets)


def survivors(case: CheckContext, probe: ProbeSet, attack: AnyAttack, ball: Ball, purpose: str | None) -> Tensor:
    """Which probe images (n,) the model still gets right after the attack, on the CPU; see `struck` for the rest."""
    if not len(probe.rows):
        return torch.zeros(0, dtype=torch.bool)
    with bound(case.target, attack, case.terms.precision) as craft:
        found = attacked_images(case, probe, craft, ball, purpose)
    wrong_n = inference.predict(case.target.model, found, DECISION_BATCH).argmax(dim=1) != probe.labels
    # NaN is no image, though it is misclassified by every network
    return (~(wrong_n & found.flatten(1).isfinite().all(dim=1))).cpu()


def attack_survivors(
    case: CheckContext, probe: ProbeSet, standing_n: Tensor, attack: AnyAttack, ball: Ball, purpose: str | None
) -> Tensor:
    """Attack only what still stands; what stands after that, again for all probe images (n,)."""
    left_n = standing_n.clone()
    left_n[standing_n] = survivors(case, probe.part(standing_n), attack, ball, purpose)
    return left_n


def attacked_images(case: CheckContext, probe: ProbeSet, craft: AttackFn, ball: Ball, purpose: str | None) -> Tensor:
    """The probe images (n, C, H, W) after the attack, inside the ball.

    `purpose` names the random streams; with None nothing is random. Stops when the model cannot be attacked.
    """
    try:
        size = case.terms.batch_size or fitting_batch(case.target.model, probe.images)
        rows = torch.arange(len(probe.images))
        parts = in_batches(lambda some: _batch(case, probe, some, craft, ball, purpose), rows, size)
        return torch.cat([found for _, found in parts])
    except Exception as error:  # anybody's model, which may raise anything
        raise CheckSkippedError("not checked", f"attacking the model raised {first_line(error)}") from error


def _batch(
    case: CheckContext, probe: ProbeSet, rows: Tensor, craft: AttackFn, ball: Ball, purpose: str | None
) -> Tensor:
    here = rows.to(probe.images.device)
    draws: Draws = NoRandomness() if purpose is None else ImageDraws(case.terms.seed, purpose, probe.rows[rows])
    return engine.run_attack(
        case.target.model,
        probe.images[here],
        probe.labels[here],
        craft,
        ball=ball,
        draws=draws,
        precision=case.terms.precision,
    ).images


def gradient_fault(case: CheckContext, probe: ProbeSet, loss: Loss) -> str:
    """What is wrong with the gradients at the probe images, in words; empty where nothing is."""
    zero: list[Tensor] = []
    broken: list[Tensor] = []

    def look(
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        /,
        *,
        ball: Ball,
        draws: Draws,
        fooled: IsAdversarial | None = None,
    ) -> Tensor:
        del ball, draws, fooled
        gradient_BD = input_gradient(model, images_BCHW, labels_B, loss)[0].flatten(1)
        zero.append((gradient_BD == 0).all(dim=1))
        broken.append(~gradient_BD.isfinite().all(dim=1))
        return images_BCHW

    attacked_images(case, probe, look, case.terms.ball, None)
    shares = [float(torch.cat(found).float().mean()) for found in (broken, zero)]
    if shares[0] > 0:
        return f"the gradient is NaN or infinite on {percent(shares[0])} of them"
    if shares[1] > LARGE:
        return f"the gradient is masked, exactly zero on {percent(shares[1])} of them"
    return ""


def access(attack: AnyAttack) -> Access:
    """What an attack may know of the model."""
    return registry.ENTRIES[type(attack)].access


def white_box(case: CheckContext) -> list[str]:
    """Names of the attacks of this evaluation that follow the model's own gradients."""
    return [name for name in case.measured.outcomes if access(case.attacks[name]) == "white"]


def due(case: CheckContext, names: Sequence[str]) -> Tensor:
    """Which images (N,) were to meet all of these attacks: some attacks are limited to the first ones."""
    rows_N = torch.arange(len(case.measured.labels))
    return rows_N < min([case.measured.outcomes[name].limit for name in names], default=0)


def climbs_cross_entropy(attack: AnyAttack) -> bool:
    """Whether it follows the gradient of the model's cross-entropy, which vanishes where the output saturates."""
    ce = isinstance(attack, Fgsm | ApgdCe | GateFrozen | Misrouting | Experts)
    return ce or (isinstance(attack, Pgd) and attack.loss == "ce")


def rests_on_cross_entropy(case: CheckContext) -> bool:
    """Whether there are white-box attacks in this evaluation and all climb the cross-entropy."""
    names = white_box(case)
    return bool(names) and all(climbs_cross_entropy(case.attacks[name]) for name in names)


def change(first_n: Tensor, second_n: Tensor, case: CheckContext) -> PairedDifference:
    """Accuracy of the first minus that of the second, paired."""
    return compare(first_n, second_n, case.terms.seed)


def found_more(drop: PairedDifference) -> Status:
    """What a drop of accuracy under more effort means: nothing within its interval, much when it is large."""
    if drop.low <= 0:
        return "pass"
    return "fail" if drop.difference > LARGE else "warn"

"""Shared parts of the checks: probe images, attacks on them, and how a result is assembled.

Shapes: N images of the evaluation, n probe images, C channel, H/W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks import engine, registry
from advmoe.attacks.apgd import ApgdCe
from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting
from advmoe.attacks.interface import AttackFn, IsAdversarial, Loss, Model, input_gradient
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.registry import Access, AttackSettings
from advmoe.core.errors import error_summary
from advmoe.evaluation.batch_size import estimate_batch_size, is_out_of_memory, map_batches
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Status
from advmoe.evaluation.harness import DECISION_BATCH, bind_attack
from advmoe.models import inference
from advmoe.statistics.paired_tests import PairedDifference, compare_paired

STEP_SIZE = 0.25  # of epsilon, usual for PGD; 20 steps cover five times the radius
LARGE_DROP = 0.1  # of the images: a significant drop of this size fails a check
DIGITS = 6
SEVERITY: tuple[Status, ...] = ("not checked", "warn", "fail")

CheckOutput = tuple[Status, str, dict[str, Any]]
Issue = tuple[Status, str]


class CheckSkippedError(Exception):
    """Ends a check early with the given status and sentence."""

    def __init__(self, status: Status, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def run_check(check: str, function: Callable[[CheckContext], CheckOutput], context: CheckContext) -> CheckResult:
    """Runs one check and returns its result, with rounded evidence; handles CheckSkippedError."""
    try:
        status, sentence, evidence = function(context)
    except CheckSkippedError as skipped:
        status, sentence, evidence = skipped.status, skipped.sentence, {}
    return CheckResult(check, status, sentence, _rounded(evidence))


def error_message(error: Exception) -> str:
    """Returns the error of a user's model or attack as one line; raises out-of-memory errors again."""
    if is_out_of_memory(error):
        raise error
    return error_summary(error)


def worst_status(issues: Sequence[Issue], passed: str) -> Issue:
    """Returns the worst status of the issues with all its sentences, or a pass with `passed` if there are none."""
    for status in reversed(SEVERITY):
        sentences = [sentence for found, sentence in issues if found == status]
        if sentences:
            return status, "; ".join(sentences)
    return "pass", passed


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
    """Formats a share: 0.123 -> '12.3 %'."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class ProbeSet:
    """Probe images (n, C, H, W), their labels (n,), and on the CPU their positions (n,) in the evaluation."""

    images: Tensor
    labels: Tensor
    rows: Tensor

    def select(self, mask_n: Tensor) -> "ProbeSet":
        """Returns the images where `mask_n` (n,) is True."""
        positions = mask_n.to(self.images.device)
        return ProbeSet(self.images[positions], self.labels[positions], self.rows[mask_n.cpu()])

    def first(self, count: int) -> "ProbeSet":
        """Returns the first `count` images."""
        return ProbeSet(self.images[:count], self.labels[:count], self.rows[:count])


def probe_images(context: CheckContext) -> ProbeSet:
    """Returns the first `settings.images` correctly classified images. Raises CheckSkippedError if there are none."""
    right_N = context.result.clean_logits.argmax(dim=1) == context.result.labels
    rows = right_N.nonzero().squeeze(1)[: context.settings.images]
    if not len(rows):
        raise CheckSkippedError("not checked", "the model classifies no clean image correctly")
    return probe_at(context, rows)


def probe_at(context: CheckContext, rows: Tensor) -> ProbeSet:
    """Returns the images at the given positions (n,) of the evaluation."""
    positions = rows.to(context.target.images.device)
    return ProbeSet(context.target.images[positions], context.target.labels[positions], rows)


class NoRandomness:
    """Random draws that are all 0: an ascent starts at the image itself and moves only along gradients."""

    def uniform(self, like: Tensor) -> Tensor:
        """Returns zeros."""
        return torch.zeros_like(like)

    def normal(self, like: Tensor) -> Tensor:
        """Returns zeros."""
        return torch.zeros_like(like)

    def pick(self, rows: Tensor) -> "NoRandomness":
        """Returns itself."""
        del rows
        return self


def plain_pgd(steps: int, loss: Loss = "ce", targets: int = 0) -> Pgd:
    """Returns the settings of PGD with one restart and the usual step size."""
    return Pgd(kind="pgd", steps=steps, step_size=STEP_SIZE, restarts=1, loss=loss, targets=targets)


def survivors(
    context: CheckContext, probe: ProbeSet, attack: AttackSettings, ball: Ball, purpose: str | None
) -> Tensor:
    """Returns which probe images (n,) are correctly classified after the attack, on the CPU; see `attacked_images`."""
    if not len(probe.rows):
        return torch.zeros(0, dtype=torch.bool)
    with bind_attack(context.target, attack, context.config.precision) as attack_fn:
        found = attacked_images(context, probe, attack_fn, ball, purpose)
    wrong_n = inference.predict(context.target.model, found, DECISION_BATCH).argmax(dim=1) != probe.labels
    # NaN pixels do not count as adversarial
    return (~(wrong_n & found.flatten(1).isfinite().all(dim=1))).cpu()


def attack_survivors(
    context: CheckContext, probe: ProbeSet, remaining_n: Tensor, attack: AttackSettings, ball: Ball, purpose: str | None
) -> Tensor:
    """Attacks only the images of `remaining_n` (n,) bool; returns the survivors among all probe images (n,)."""
    right_n = remaining_n.clone()
    right_n[remaining_n] = survivors(context, probe.select(remaining_n), attack, ball, purpose)
    return right_n


def attacked_images(
    context: CheckContext, probe: ProbeSet, attack_fn: AttackFn, ball: Ball, purpose: str | None
) -> Tensor:
    """Returns the probe images (n, C, H, W) after the attack, inside the ball.

    `purpose` names the random streams; None disables randomness. Raises CheckSkippedError if the model raises.
    """
    try:
        size = context.config.batch_size or estimate_batch_size(context.target.model, probe.images)
        rows = torch.arange(len(probe.images))
        parts = map_batches(lambda rows_b: _batch(context, probe, rows_b, attack_fn, ball, purpose), rows, size)
        return torch.cat([found for _, found in parts])
    except Exception as error:  # a user's model may raise anything
        raise CheckSkippedError("not checked", f"attacking the model raised {error_summary(error)}") from error


def _batch(
    context: CheckContext, probe: ProbeSet, rows: Tensor, attack_fn: AttackFn, ball: Ball, purpose: str | None
) -> Tensor:
    positions = rows.to(probe.images.device)
    draws: RandomStream = (
        NoRandomness() if purpose is None else ImageStreams(context.config.seed, purpose, probe.rows[rows])
    )
    return engine.run_attack(
        context.target.model,
        probe.images[positions],
        probe.labels[positions],
        attack_fn,
        ball=ball,
        draws=draws,
        precision=context.config.precision,
    ).images


def gradient_fault(context: CheckContext, probe: ProbeSet, loss: Loss) -> str:
    """Returns a description of zero, NaN or infinite gradients at the probe images, or an empty string."""
    zero: list[Tensor] = []
    broken: list[Tensor] = []

    def record_gradients(
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        /,
        *,
        ball: Ball,
        draws: RandomStream,
        is_adversarial: IsAdversarial | None = None,
    ) -> Tensor:
        del ball, draws, is_adversarial
        gradient_BD = input_gradient(model, images_BCHW, labels_B, loss)[0].flatten(1)
        zero.append((gradient_BD == 0).all(dim=1))
        broken.append(~gradient_BD.isfinite().all(dim=1))
        return images_BCHW

    attacked_images(context, probe, record_gradients, context.config.ball, None)
    shares = [float(torch.cat(found).float().mean()) for found in (broken, zero)]
    if shares[0] > 0:
        return f"the gradient is NaN or infinite on {percent(shares[0])} of them"
    if shares[1] > LARGE_DROP:
        return f"the gradient is masked, exactly zero on {percent(shares[1])} of them"
    return ""


def access(attack: AttackSettings) -> Access:
    """Returns the access of an attack to the model."""
    return registry.REGISTRY[type(attack)].access


def white_box(context: CheckContext) -> list[str]:
    """Returns names of the white-box attacks of the evaluation."""
    return [name for name in context.result.outcomes if access(context.attacks[name]) == "white"]


def scheduled(context: CheckContext, names: Sequence[str]) -> Tensor:
    """Returns which images (N,) bool are within the limits of all of these attacks."""
    rows_N = torch.arange(len(context.result.labels))
    return rows_N < min([context.result.outcomes[name].limit for name in names], default=0)


def maximises_cross_entropy(attack: AttackSettings) -> bool:
    """Whether an attack follows the gradient of the cross-entropy, which vanishes where the output saturates."""
    ce = isinstance(attack, Fgsm | ApgdCe | GateFrozen | Misrouting | Experts)
    return ce or (isinstance(attack, Pgd) and attack.loss == "ce")


def relies_on_cross_entropy(context: CheckContext) -> bool:
    """Whether there are white-box attacks in the evaluation and all maximise the cross-entropy."""
    names = white_box(context)
    return bool(names) and all(maximises_cross_entropy(context.attacks[name]) for name in names)


def paired_difference(first_n: Tensor, second_n: Tensor, context: CheckContext) -> PairedDifference:
    """Returns the accuracy of the first minus that of the second, paired, with its interval."""
    return compare_paired(first_n, second_n, context.config.seed)


def drop_status(drop: PairedDifference) -> Status:
    """Returns the status for a drop of accuracy: pass if not significant, fail if larger than LARGE_DROP, else warn."""
    if drop.low <= 0:
        return "pass"
    return "fail" if drop.difference > LARGE_DROP else "warn"

"""Check 4, gradients: they are finite, not zero, of logits in full precision, and pass through the gate.

Gradient-based attacks fail where the gradient is exactly 0, so robust accuracy on such images is not valid (Athalye et
al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705, section 5).

Shapes: B batch, C channel, H/W pixels, K classes, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from advmoe.attacks.apgd import ApgdT
from advmoe.attacks.fab import FabT
from advmoe.attacks.interface import margin, pixel_gradient
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.registry import AttackSettings
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.gradient_trace import GradientStep, is_zero, trace_ascent
from advmoe.evaluation.checks.probe_attacks import (
    CheckOutput,
    CheckSkippedError,
    Issue,
    ProbeSet,
    error_message,
    percent,
    probe_images,
    run_check,
    worst_status,
)
from advmoe.models import inference

CHECK_ID = "gradients"
FAIL_SHARE = 0.1  # share of exactly zero gradients from which the check fails; fewer are a warning
SUM_TOLERANCE = 1e-2  # largest distance from 1 of the sum of probabilities, in bfloat16 too


@dataclass
class _GradientCounts:
    """Counts over all points of an ascent.

    `broken`: points with NaN or infinite logits or gradients; `right`: other points, correctly classified; `zero`:
    those of `right` whose cross-entropy has gradient 0; `flat`: those of `zero` whose margin has gradient 0; `largest`:
    largest lead of the true logit at points of `zero`.
    """

    points: int = 0
    broken: int = 0
    right: int = 0
    zero: int = 0
    flat: int = 0
    largest: float = 0.0
    clean_logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def add(self, model: nn.Module, current: GradientStep, labels: Tensor) -> None:
        finite = current.logits.isfinite().all(dim=1) & current.gradient.isfinite().flatten(1).all(dim=1)
        right = finite & (current.logits.argmax(dim=1) == labels)
        zero = right & is_zero(current.gradient)
        self.points, self.broken = self.points + len(finite), self.broken + int((~finite).sum())
        self.right, self.zero = self.right + int(right.sum()), self.zero + int(zero.sum())
        if zero.any():
            gradient, logits = pixel_gradient(model, current.points[zero], lambda logits: margin(logits, labels[zero]))
            self.flat += int(is_zero(gradient).sum())
            self.largest = max(self.largest, float(-margin(logits, labels[zero]).min()))

    @property
    def share(self) -> float:
        """Share of correctly classified points whose gradient is 0."""
        return self.zero / self.right if self.right else 0.0


def gradients(context: CheckContext) -> CheckResult:
    """Checks logits and input gradients at the clean images and at every step of an ascent."""
    return run_check(CHECK_ID, _check, context)


def _check(context: CheckContext) -> CheckOutput:
    model, probe = context.target.model, probe_images(context)
    try:
        with inference.eval_mode(model):
            counts = _count_gradients(context, probe)
            gates = _blocked_gates(model, context.target.images[: context.settings.images])
    except Exception as error:  # a user's model may raise anything
        raise CheckSkippedError("fail", f"the model's gradient cannot be computed ({error_message(error)})") from error
    issues = [
        *_output_issues(counts.clean_logits),
        *_finiteness_issues(counts),
        *_zero_gradient_issues(counts, context),
        *_gate_issues(gates),
    ]
    evidence = {
        "images": len(probe.rows),
        "points": counts.points,
        "not_finite": counts.broken,
        "zero_share": counts.share,
        "zero_margin_share": counts.flat / counts.right if counts.right else 0.0,
        "dtype": str(counts.clean_logits.dtype).removeprefix("torch."),
    }
    passed = f"logits and gradients are finite and not zero at {counts.points} points of an attack"
    return *worst_status(issues, passed), evidence


def _count_gradients(context: CheckContext, probe: ProbeSet) -> _GradientCounts:
    counts = _GradientCounts()
    for current in trace_ascent(context, probe, CHECK_ID):
        if not counts.points:
            counts.clean_logits = current.logits
        counts.add(context.target.model, current, probe.labels)
    return counts


# ---- the output


def _output_issues(logits_BK: Tensor) -> Iterator[Issue]:
    if is_probability(logits_BK):
        yield (
            "fail",
            "softmax output: the model returns probabilities instead of logits, and the loss takes the softmax of a "
            "softmax; remove the last softmax, or take its logarithm",
        )
    elif dtype := low_precision(logits_BK):
        yield (
            "fail",
            f"the model runs in low precision: its logits have the precision of {dtype}, which causes "
            "ties and zero gradients; run it in float32",
        )


def is_probability(logits_BK: Tensor) -> bool:
    """Whether every row lies in [0, 1] and sums to 1."""
    inside = (logits_BK >= 0).all() and (logits_BK <= 1).all()
    return bool(inside and ((logits_BK.double().sum(dim=1) - 1).abs() < SUM_TOLERANCE).all())


def low_precision(logits_BK: Tensor) -> str | None:
    """Returns the lower-precision dtype that represents all logits exactly, if any; None for integers (vote counts)."""
    if logits_BK.dtype not in (torch.float32, torch.float64):
        return str(logits_BK.dtype).removeprefix("torch.")
    if (logits_BK == logits_BK.round()).all():
        return None
    for name, coarse in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        if torch.equal(logits_BK.to(coarse).to(logits_BK), logits_BK):
            return name
    return None


# ---- the numbers and the gradient


def _finiteness_issues(counts: _GradientCounts) -> Iterator[Issue]:
    if counts.broken:
        yield (
            "fail",
            f"NaN or infinite logits or gradients at {counts.broken} of {counts.points} points of an attack "
            "(a division by zero, or the logarithm or root of zero)",
        )


def _zero_gradient_issues(counts: _GradientCounts, context: CheckContext) -> Iterator[Issue]:
    if not counts.zero:
        return
    share = f"{percent(counts.share)} of the input gradients are exactly zero on correctly classified images"
    if 2 * counts.flat >= counts.zero:
        cause = f"{share}: an operation blocks the gradient (rounding, a threshold, detach)"
        yield ("fail" if counts.share >= FAIL_SHARE else "warn", cause)
        return
    scale_free = [name for name, attack in context.attacks.items() if _ignores_scale(attack)]
    cause = f"{share}: the logits are so far apart (up to {counts.largest:.3g}) that the cross-entropy is flat"
    if scale_free:
        yield ("warn", f"{cause}; only attacks on another loss are valid ({', '.join(scale_free)})")
    else:
        yield ("fail" if counts.share >= FAIL_SHARE else "warn", f"{cause}, and no attack used another loss")


def _ignores_scale(attack: AttackSettings) -> bool:
    return isinstance(attack, ApgdT | FabT) or (isinstance(attack, Pgd) and attack.loss == "margin")


# ---- the gate


def _gate_issues(blocked: list[str]) -> Iterator[Issue]:
    if blocked:
        yield (
            "fail",
            f"the gate is not differentiable: {', '.join(blocked)} changes with the pixels, but "
            "no gradient passes through it (a hard choice of experts, or detach), so attacks ignore the routing",
        )


def _blocked_gates(model: nn.Module, images_BCHW: Tensor) -> list[str]:
    """Returns names of gates whose output depends on the pixels but that no gradient passes, before or after."""
    gates = {
        f"{name}.gate".lstrip("."): parent.gate
        for name, parent in model.named_modules()
        if isinstance(getattr(parent, "gate", None), nn.Module)
    }
    return [name for name, gate in gates.items() if _blocks(model, gate, images_BCHW)]


def _blocks(model: nn.Module, gate: nn.Module, images_BCHW: Tensor) -> bool:
    pixels = images_BCHW.detach().clone().requires_grad_(True)
    with torch.enable_grad(), _captured_outputs(gate) as captured:
        logits = model(pixels)
    # the gate is not called or is constant, or the model has no gradient at all: not a fault of the gate
    if not captured or not _varies(captured[0]) or not _has_gradient(logits, pixels):
        return False
    weights = captured[0]
    return not (_has_gradient(weights, pixels) and (weights is logits or _has_gradient(logits, weights)))


def _varies(weights_BE: Tensor) -> bool:
    return weights_BE.ndim > 0 and bool((weights_BE != weights_BE[:1]).any())


def _has_gradient(end: Tensor, start: Tensor) -> bool:
    """Whether the gradient of `end` with respect to `start` is not zero."""
    if not (end.requires_grad and start.requires_grad):
        return False
    weights = torch.linspace(1.0, 2.0, end.numel()).to(end).view_as(end)  # a constant would cancel in a softmax
    (gradient,) = torch.autograd.grad(end, start, weights, retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


@contextmanager
def _captured_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    captured: list[Tensor] = []

    def capture(_: nn.Module, __: object, output: object) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        captured.extend(tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point())

    handle = module.register_forward_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()

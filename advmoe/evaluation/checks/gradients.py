"""Check 4: is there a gradient to follow, of logits, in full precision, and through the gate?

Attacks that climb are blind where the gradient is exactly 0, and a robust accuracy made of such images is none (Athalye
et al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705, section 5).

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
from advmoe.attacks.registry import AnyAttack
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.gradient_trace import GradientStep, ascend, vanished
from advmoe.evaluation.checks.probe_attacks import (
    Answer,
    CheckSkippedError,
    ProbeSet,
    Remark,
    error_message,
    percent,
    probe_images,
    run_check,
    worst_status,
)
from advmoe.models import inference

CHECK = "gradients"
MANY = 0.1  # share of exactly zero gradients that is a failure; single ones are a reason to look
ONE = 1e-2  # how far from 1 a row of probabilities may add up, in bfloat16 too


@dataclass
class _Seen:
    """Counts over all points of an ascent. `right`: correctly classified points with finite numbers; `zero`: those of
    them without a gradient of the cross-entropy; `flat`: those of these without one of the margin either.
    """

    points: int = 0
    broken: int = 0
    right: int = 0
    zero: int = 0
    flat: int = 0
    largest: float = 0.0
    clean_logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def add(self, model: nn.Module, seen: GradientStep, labels: Tensor) -> None:
        finite = seen.logits.isfinite().all(dim=1) & seen.gradient.isfinite().flatten(1).all(dim=1)
        right = finite & (seen.logits.argmax(dim=1) == labels)
        zero = right & vanished(seen.gradient)
        self.points, self.broken = self.points + len(finite), self.broken + int((~finite).sum())
        self.right, self.zero = self.right + int(right.sum()), self.zero + int(zero.sum())
        if zero.any():
            gradient, logits = pixel_gradient(model, seen.points[zero], lambda logits: margin(logits, labels[zero]))
            self.flat += int(vanished(gradient).sum())
            self.largest = max(self.largest, float(-margin(logits, labels[zero]).min()))

    @property
    def share(self) -> float:
        """Of correctly classified points, how many have no gradient."""
        return self.zero / self.right if self.right else 0.0


def gradients(case: CheckContext) -> CheckResult:
    """Looks at logits and input gradients at the clean images and at every step of an ascent from them."""
    return run_check(CHECK, _answer, case)


def _answer(case: CheckContext) -> Answer:
    model, probe = case.target.model, probe_images(case)
    try:
        with inference.eval_mode(model):
            seen = _watch(case, probe)
            gates = _blocked_gates(model, case.target.images[: case.probes.images])
    except Exception as error:  # anybody's model, which may raise anything
        raise CheckSkippedError("fail", f"the model's gradient cannot be computed ({error_message(error)})") from error
    remarks = [*_of_output(seen.clean_logits), *_of_numbers(seen), *_of_gradient(seen, case), *_of_gates(gates)]
    evidence = {
        "images": len(probe.rows),
        "points": seen.points,
        "not_finite": seen.broken,
        "zero_share": seen.share,
        "zero_margin_share": seen.flat / seen.right if seen.right else 0.0,
        "dtype": str(seen.clean_logits.dtype).removeprefix("torch."),
    }
    otherwise = f"logits and gradients are finite and not zero at {seen.points} points on the way of an attack"
    return *worst_status(remarks, otherwise), evidence


def _watch(case: CheckContext, probe: ProbeSet) -> _Seen:
    seen = _Seen()
    for here in ascend(case, probe, CHECK):
        if not seen.points:
            seen.clean_logits = here.logits
        seen.add(case.target.model, here, probe.labels)
    return seen


# ---- the output


def _of_output(logits_BK: Tensor) -> Iterator[Remark]:
    if is_probability(logits_BK):
        yield (
            "fail",
            "softmax output: the model gives probabilities instead of logits, and the loss takes the softmax of a "
            "softmax; remove the last softmax, or take its logarithm",
        )
    elif coarse := low_precision(logits_BK):
        yield (
            "fail",
            f"the model decides in low precision: its logits hold no more than {coarse}, which ties "
            "classes and swallows gradients; run it in float32",
        )


def is_probability(logits_BK: Tensor) -> bool:
    """Whether every row lies in [0, 1] and adds up to 1."""
    inside = (logits_BK >= 0).all() and (logits_BK <= 1).all()
    return bool(inside and ((logits_BK.double().sum(dim=1) - 1).abs() < ONE).all())


def low_precision(logits_BK: Tensor) -> str | None:
    """The type of fewer digits that holds all the logits, if there is one; whole numbers, votes say, prove nothing."""
    if logits_BK.dtype not in (torch.float32, torch.float64):
        return str(logits_BK.dtype).removeprefix("torch.")
    if (logits_BK == logits_BK.round()).all():
        return None
    for name, coarse in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        if torch.equal(logits_BK.to(coarse).to(logits_BK), logits_BK):
            return name
    return None


# ---- the numbers and the gradient


def _of_numbers(seen: _Seen) -> Iterator[Remark]:
    if seen.broken:
        yield (
            "fail",
            f"NaN or infinite logits or gradients at {seen.broken} of {seen.points} points of an attack (a division by "
            "zero, or the logarithm or root of zero)",
        )


def _of_gradient(seen: _Seen, case: CheckContext) -> Iterator[Remark]:
    if not seen.zero:
        return
    share = f"{percent(seen.share)} of the input gradients are exactly zero on correctly classified images"
    if 2 * seen.flat >= seen.zero:
        cause = (
            f"{share}: something on the way cuts the gradient off (rounding, a threshold, detach), attacks are blind"
        )
        yield ("fail" if seen.share >= MANY else "warn", cause)
        return
    ways_out = [name for name, attack in case.attacks.items() if _ignores_scale(attack)]
    cause = f"{share}: the logits are so far apart (up to {seen.largest:.3g}) that the cross-entropy is flat"
    if ways_out:
        yield ("warn", f"{cause}; only attacks on another loss count here ({', '.join(ways_out)})")
    else:
        yield ("fail" if seen.share >= MANY else "warn", f"{cause}, and no attack used another loss")


def _ignores_scale(attack: AnyAttack) -> bool:
    return isinstance(attack, ApgdT | FabT) or (isinstance(attack, Pgd) and attack.loss == "margin")


# ---- the gate


def _of_gates(blocked: list[str]) -> Iterator[Remark]:
    if blocked:
        yield (
            "fail",
            f"the gate is not differentiable: {', '.join(blocked)} changes with the pixels, but no gradient goes "
            "through it (a hard choice of experts, or detach), so attacks do not see the routing",
        )


def _blocked_gates(model: nn.Module, images_BCHW: Tensor) -> list[str]:
    """Names of the gates whose output moves with the pixels while no gradient passes, before them or after."""
    gates = {
        f"{name}.gate".lstrip("."): parent.gate
        for name, parent in model.named_modules()
        if isinstance(getattr(parent, "gate", None), nn.Module)
    }
    return [name for name, gate in gates.items() if _blocks(model, gate, images_BCHW)]


def _blocks(model: nn.Module, gate: nn.Module, images_BCHW: Tensor) -> bool:
    pixels = images_BCHW.detach().clone().requires_grad_(True)
    with torch.enable_grad(), _outputs(gate) as heard:
        logits = model(pixels)
    # not called, or it weighs all alike: nothing to miss; no gradient at all: no fault of the gate's
    if not heard or not _moves(heard[0]) or not _reaches(logits, pixels):
        return False
    weights = heard[0]
    return not (_reaches(weights, pixels) and (weights is logits or _reaches(logits, weights)))


def _moves(weights_BE: Tensor) -> bool:
    return weights_BE.ndim > 0 and bool((weights_BE != weights_BE[:1]).any())


def _reaches(end: Tensor, start: Tensor) -> bool:
    """Whether any gradient of `end` arrives at `start`."""
    if not (end.requires_grad and start.requires_grad):
        return False
    slope = torch.linspace(1.0, 2.0, end.numel()).to(end).view_as(end)  # all alike would cancel in a softmax
    (gradient,) = torch.autograd.grad(end, start, slope, retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    heard: list[Tensor] = []

    def listen(_: nn.Module, __: object, output: object) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        heard.extend(tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point())

    handle = module.register_forward_hook(listen)
    try:
        yield heard
    finally:
        handle.remove()

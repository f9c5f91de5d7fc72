"""Check 5, determinism: repeated forward passes agree. A randomised model needs attacks on its expectation (EoT).

Athalye et al. 2018, arXiv 1802.00420. Compares repeated passes, passes with another random state, and passes that
compute gradients.

Shapes: B batch, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as Dropout

from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.models import inference

CHECK_ID = "determinism"
REPEATED, RESEEDED, WITH_GRADIENT = "repeated passes", "another random state", "computing gradients"
LOGIT_TOLERANCE = 1e-4  # of the largest logit: a different summation order changes less


def determinism(context: CheckContext) -> CheckResult:
    """Compares the logits of several forward passes over the same images."""
    images = context.target.images[: context.settings.images]
    with inference.eval_mode(context.target.model) as model, torch.random.fork_rng(devices=_devices(images)):
        first_BK, logits = _passes(model, images)
        dropouts = [name for name, part in model.named_modules() if isinstance(part, Dropout) and part.training]
    changes = {variant: _largest_change(logits_BK, first_BK) for variant, logits_BK in logits.items()}
    rounding = LOGIT_TOLERANCE * float(first_BK.abs().max())
    if changes[WITH_GRADIENT] <= rounding:  # other kernels, not a property of the model
        changes[WITH_GRADIENT] = 0.0
    variant = max(changes, key=lambda variant: changes[variant])
    flipped = int((logits[variant].argmax(1) != first_BK.argmax(1)).sum())
    evidence = {"images": len(images), "largest_change": round(changes[variant], 6), "decisions": flipped}
    if not changes[variant]:
        return CheckResult(CHECK_ID, "pass", f"passes over the same {len(images)} images are bit-identical", evidence)
    difference = (
        f"with {variant} the logits change by up to {changes[variant]:.2g}, and {flipped} of {len(images)} decisions "
        "change"
    )
    if changes[variant] <= rounding:
        return CheckResult(
            CHECK_ID, "warn", f"{difference}: non-deterministic rounding, as in some GPU kernels", evidence
        )
    return CheckResult(CHECK_ID, "fail", f"{difference}: {_cause(dropouts, variant)}", evidence)


def _cause(dropouts: list[str], variant: str) -> str:
    if dropouts:
        return f"dropout is active in eval mode ({dropouts[0]})"
    if variant == WITH_GRADIENT:
        return "it behaves differently when gradients are computed, so attacks do not see the evaluated model"
    return "the model is randomised and must be attacked in expectation (EoT)"


def _passes(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns reference logits (B, K), and the logits that should equal them."""
    first = _logits(model, images, seed=0)
    others = {
        REPEATED: _logits(model, images, seed=None),
        RESEEDED: _logits(model, images, seed=1),  # detects a model that restores the random state
        WITH_GRADIENT: _logits(model, images.detach().clone().requires_grad_(True), seed=0),
    }
    return first, others


def _logits(model: nn.Module, images: Tensor, seed: int | None) -> Tensor:
    if seed is not None:
        torch.manual_seed(seed)
    with torch.set_grad_enabled(images.requires_grad):
        output: Tensor = model(images)
    return output.detach().clone()


def _largest_change(logits_BK: Tensor, first_BK: Tensor) -> float:
    """Returns the largest change of a logit, infinite for NaN."""
    change = (logits_BK.double() - first_BK.double()).abs().nan_to_num(torch.inf)
    return float(change.masked_fill(logits_BK == first_BK, 0).max())


def _devices(images: Tensor) -> list[torch.device]:
    return [images.device] if images.device.type == "cuda" else []

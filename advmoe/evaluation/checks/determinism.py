"""Check 5: does the model say the same twice? A randomised one needs attacks on its expectation (EoT).

Athalye et al. 2018, arXiv 1802.00420. Three things may tell two passes apart: the passes themselves, the state of the
random generators, and whether a gradient is asked for.

Shapes: B batch, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as Dropout

from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.models import inference

CHECK = "determinism"
AGAIN, SEEDED, WATCHED = "again", "with another random state", "when a gradient is asked for"
ROUNDING = 1e-4  # of the largest logit: kernels that add up in another order stay below


def determinism(case: CheckContext) -> CheckResult:
    """Passes the same images several times; attacks on one draw of a randomised model do not evaluate it."""
    images = case.target.images[: case.probes.images]
    with inference.eval_mode(case.target.model) as model, torch.random.fork_rng(devices=_devices(images)):
        first_BK, answers = _passes(model, images)
        dropouts = [name for name, part in model.named_modules() if isinstance(part, Dropout) and part.training]
    changes = {how: _largest(answer, first_BK) for how, answer in answers.items()}
    rounding = ROUNDING * float(first_BK.abs().max())
    if changes[WATCHED] <= rounding:  # other kernels, which is no matter of the model's
        changes[WATCHED] = 0.0
    how = max(changes, key=lambda how: changes[how])
    flipped = int((answers[how].argmax(1) != first_BK.argmax(1)).sum())
    evidence = {"images": len(images), "largest_change": round(changes[how], 6), "decisions": flipped}
    if not changes[how]:
        return CheckResult(CHECK, "pass", f"passes over the same {len(images)} images agree to the bit", evidence)
    apart = (
        f"asked {how}, the model's logits differ by up to {changes[how]:.2g} and {flipped} of {len(images)} decisions "
        "change"
    )
    if changes[how] <= rounding:
        return CheckResult(
            CHECK, "warn", f"{apart}: rounding that does not repeat, as some GPU kernels have it", evidence
        )
    return CheckResult(CHECK, "fail", f"{apart}: {_cause(dropouts, how)}", evidence)


def _cause(dropouts: list[str], how: str) -> str:
    if dropouts:
        return f"dropout stays on in eval mode ({dropouts[0]})"
    if how == WATCHED:
        return "it notices that it is attacked, so what attacks see is not what decides"
    return "it is randomised, and must be attacked in expectation (EoT)"


def _passes(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A first answer (B, K), and those that should equal it."""
    first = _answer(model, images, seed=0)
    others = {
        AGAIN: _answer(model, images, seed=None),
        SEEDED: _answer(model, images, seed=1),  # a model that puts the generator back as it was shows only here
        WATCHED: _answer(model, images.detach().clone().requires_grad_(True), seed=0),
    }
    return first, others


def _answer(model: nn.Module, images: Tensor, seed: int | None) -> Tensor:
    if seed is not None:
        torch.manual_seed(seed)
    with torch.set_grad_enabled(images.requires_grad):
        output: Tensor = model(images)
    return output.detach().clone()


def _largest(answer_BK: Tensor, first_BK: Tensor) -> float:
    """The largest change of a logit; infinite where one is no number."""
    change = (answer_BK.double() - first_BK.double()).abs().nan_to_num(torch.inf)
    return float(change.masked_fill(answer_BK == first_BK, 0).max())


def _devices(images: Tensor) -> list[torch.device]:
    return [images.device] if images.device.type == "cuda" else []

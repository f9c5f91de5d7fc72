"""Check 6: does an image's result depend on anything but the image?

On its neighbours in the batch, or on what passed through before: a BatchNorm in train mode does both, and attacks on
such a model are attacks on something else than what is deployed.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.gradient_trace import look, step
from advmoe.evaluation.checks.probe_attacks import Remark, error_message, worst_status
from advmoe.models import inference
from advmoe.runtime.machine import generator

CHECK = "isolation"
ROUNDING = 1e-4  # of the largest logit: kernels that add up in another order stay far below
STEPS = 3  # of an attack; what moves, moves at the first
FEW = 4  # images asked alone; also names put on record
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class NeighbourEffect:
    """What happens to logits when only the neighbours change, or leave: the largest change, and decisions changed."""

    change: float
    flipped: int
    scale: float

    @property
    def matters(self) -> bool:
        """Beyond rounding."""
        return self.change > ROUNDING * self.scale


def batch_independence(case: CheckContext) -> CheckResult:
    """Attacks a few steps and watches the buffers; asks images again in other company, and alone."""
    model, images = case.target.model, case.target.images[: case.probes.images]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    remarks: list[Remark] = []
    evidence: dict[str, Any] = {"images": len(images)}
    with inference.eval_mode(model):
        try:
            remarks += _of_buffers(case, images, before, evidence)
            remarks += _of_company(case, images, evidence)
        except Exception as error:  # anybody's model, which may raise anything
            remarks.append(("fail", f"the model fails on a batch that the checks make ({error_message(error)})"))
        finally:
            _put_back(model, before)
    otherwise = "an attack moves no buffer, and no image's logits depend on its neighbours"
    return CheckResult(CHECK, *worst_status(remarks, otherwise), evidence)


# ---- buffers


def _of_buffers(case: CheckContext, images: Tensor, before: Buffers, evidence: dict[str, Any]) -> Iterator[Remark]:
    model = case.target.model
    training = evidence["train_mode"] = _batch_norms_in_train_mode(model)[:FEW]
    if training:
        why = "takes its statistics from the batch even after model.eval()"
        yield ("fail", f"BatchNorm in train mode: {_some(training)} {why}")
    _attack(case, images)
    moved = [name for name, buffer in model.named_buffers() if not _same(buffer, before.get(name))]
    statistics = [name for name in moved if name.rpartition(".")[2] in STATISTICS]
    evidence["moved_buffers"] = moved[:FEW]
    if statistics and not training:
        yield ("fail", f"BatchNorm in train mode: an attack moves its running statistics ({_some(statistics)})")
    elif moved and not training:
        yield ("warn", f"the model keeps a state that an attack changes (buffer {_some(moved)})")


def _attack(case: CheckContext, images: Tensor) -> None:
    points, labels = images, case.target.labels[: len(images)]
    for _ in range(STEPS):
        points = step(case.terms.ball, look(case.target.model, points, labels), images)


def _batch_norms_in_train_mode(model: nn.Module) -> list[str]:
    """Those that take their statistics from the batch although the model was put into eval mode."""
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}
    return [name for name, norm in norms.items() if norm.training or norm.running_mean is None]


def _same(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(buffer, before)


def _put_back(model: nn.Module, before: Buffers) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and not _same(buffer, before[name]):
                buffer.copy_(before[name])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


# ---- company


def _of_company(case: CheckContext, images: Tensor, evidence: dict[str, Any]) -> Iterator[Remark]:
    model = case.target.model
    noise = torch.rand(images.shape, generator=generator(case.terms.seed, "check", CHECK)).to(images)
    if _again(model, images).matters:
        yield (
            "not checked",
            "the model answers otherwise each time it is asked, so its images' company cannot be judged",
        )
        return
    mixed, alone = _in_other_company(model, images, noise), _alone(model, images)
    evidence |= {
        "change_in_other_company": round(mixed.change, 6),
        "change_alone": round(alone.change, 6),
        "decisions": max(mixed.flipped, alone.flipped),
    }
    if mixed.matters:
        yield (
            "fail",
            f"an image's logits depend on its neighbours in the batch, by up to {mixed.change:.2g} and "
            f"{mixed.flipped} of {len(images)} decisions (statistics of the batch, as BatchNorm in train mode takes?)",
        )
    elif alone.matters:
        yield (
            "fail" if alone.flipped else "warn",
            f"an image's logits depend on how many images come along: alone they differ by {alone.change:.2g}",
        )


def _again(model: nn.Module, images: Tensor) -> NeighbourEffect:
    """The same company twice."""
    with torch.no_grad():
        return _compare(model(images), model(images))


def _in_other_company(model: nn.Module, images: Tensor, noise: Tensor) -> NeighbourEffect:
    """Either half beside noise instead of the other half: same batch size, same places, so the same kernels."""
    first_B = torch.arange(len(images), device=images.device) % 2 == 0
    with torch.no_grad():
        together = model(images)
        kept, left = (model(torch.where(own_B[:, None, None, None], images, noise)) for own_B in (first_B, ~first_B))
    return _compare(torch.where(first_B[:, None], kept, left), together)


def _alone(model: nn.Module, images: Tensor) -> NeighbourEffect:
    """A few images, each in a batch of its own."""
    with torch.no_grad():
        together = model(images)[:FEW]
        alone = torch.cat([model(image[None]) for image in images[:FEW]])
    return _compare(alone, together)


def _compare(logits_BK: Tensor, usual_BK: Tensor) -> NeighbourEffect:
    """Decisions count where they are no tie within rounding."""
    logits_BK, usual_BK = logits_BK.double(), usual_BK.double()
    scale = float(usual_BK.abs().max())
    best_B2 = usual_BK.topk(2, dim=1).values
    clear_B = best_B2[:, 0] - best_B2[:, 1] > ROUNDING * scale
    flipped_B = clear_B & (logits_BK.argmax(1) != usual_BK.argmax(1))
    change = (logits_BK - usual_BK).abs().nan_to_num(torch.inf)
    return NeighbourEffect(float(change.max()), int(flipped_B.sum()), scale)

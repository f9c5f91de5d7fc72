"""Check 6, batch independence: the logits of an image depend on this image alone.

Not on the other images of the batch, and not on earlier forward passes. A BatchNorm in train mode depends on both, and
attacks on such a model do not evaluate the deployed model.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.gradient_trace import gradient_at, next_points
from advmoe.evaluation.checks.probe_attacks import Issue, error_message, worst_status
from advmoe.models import inference
from advmoe.runtime.machine import generator

CHECK_ID = "isolation"
LOGIT_TOLERANCE = 1e-4  # of the largest logit: a different summation order changes far less
STEPS = 3  # of an attack; buffers that change do so at the first step
FEW = 4  # images passed alone; also names in the evidence
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class NeighbourEffect:
    """Effect of other neighbours on logits: the largest change, changed decisions, and the largest logit."""

    change: float
    flipped: int
    scale: float

    @property
    def is_significant(self) -> bool:
        """Whether the change exceeds rounding."""
        return self.change > LOGIT_TOLERANCE * self.scale


def batch_independence(context: CheckContext) -> CheckResult:
    """Compares buffers before and after a few attack steps, and logits with other neighbours and alone."""
    model, images = context.target.model, context.target.images[: context.settings.images]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    issues: list[Issue] = []
    evidence: dict[str, Any] = {"images": len(images)}
    with inference.eval_mode(model):
        try:
            issues += _buffer_issues(context, images, before, evidence)
            issues += _neighbour_issues(context, images, evidence)
        except Exception as error:  # a user's model may raise anything
            issues.append(("fail", f"the model fails on a batch of this check ({error_message(error)})"))
        finally:
            _restore_buffers(model, before)
    passed = "an attack changes no buffer, and no image's logits depend on its neighbours"
    return CheckResult(CHECK_ID, *worst_status(issues, passed), evidence)


# ---- buffers


def _buffer_issues(context: CheckContext, images: Tensor, before: Buffers, evidence: dict[str, Any]) -> Iterator[Issue]:
    model = context.target.model
    train_mode = evidence["train_mode"] = _batch_norms_in_train_mode(model)[:FEW]
    if train_mode:
        cause = "uses batch statistics even after model.eval()"
        yield ("fail", f"BatchNorm in train mode: {_abbreviate(train_mode)} {cause}")
    _attack(context, images)
    changed = [name for name, buffer in model.named_buffers() if not _unchanged(buffer, before.get(name))]
    statistics = [name for name in changed if name.rpartition(".")[2] in RUNNING_STATISTICS]
    evidence["moved_buffers"] = changed[:FEW]
    if statistics and not train_mode:
        yield ("fail", f"BatchNorm in train mode: an attack changes its running statistics ({_abbreviate(statistics)})")
    elif changed and not train_mode:
        yield ("warn", f"an attack changes a buffer of the model: {_abbreviate(changed)}")


def _attack(context: CheckContext, images: Tensor) -> None:
    points, labels = images, context.target.labels[: len(images)]
    for _ in range(STEPS):
        points = next_points(context.config.ball, gradient_at(context.target.model, points, labels), images)


def _batch_norms_in_train_mode(model: nn.Module) -> list[str]:
    """Returns the BatchNorms that use batch statistics although the model is in eval mode."""
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}
    return [name for name, norm in norms.items() if norm.training or norm.running_mean is None]


def _unchanged(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(buffer, before)


def _restore_buffers(model: nn.Module, before: Buffers) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and not _unchanged(buffer, before[name]):
                buffer.copy_(before[name])


def _abbreviate(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


# ---- neighbours


def _neighbour_issues(context: CheckContext, images: Tensor, evidence: dict[str, Any]) -> Iterator[Issue]:
    model = context.target.model
    noise = torch.rand(images.shape, generator=generator(context.config.seed, "check", CHECK_ID)).to(images)
    if _repeat_effect(model, images).is_significant:
        yield (
            "not checked",
            "logits differ between identical passes, so the effect of neighbours cannot be measured",
        )
        return
    other, alone = _other_neighbours_effect(model, images, noise), _single_image_effect(model, images)
    evidence |= {
        "change_in_other_company": round(other.change, 6),
        "change_alone": round(alone.change, 6),
        "decisions": max(other.flipped, alone.flipped),
    }
    if other.is_significant:
        yield (
            "fail",
            f"an image's logits depend on its neighbours in the batch, by up to {other.change:.2g} and "
            f"{other.flipped} of {len(images)} decisions (batch statistics, as in a BatchNorm in train mode?)",
        )
    elif alone.is_significant:
        yield (
            "fail" if alone.flipped else "warn",
            f"an image's logits depend on the batch size: alone they differ by {alone.change:.2g}",
        )


def _repeat_effect(model: nn.Module, images: Tensor) -> NeighbourEffect:
    """The same batch twice."""
    with torch.no_grad():
        return _compare(model(images), model(images))


def _other_neighbours_effect(model: nn.Module, images: Tensor, noise: Tensor) -> NeighbourEffect:
    """Replaces one half of the batch by noise, then the other: same batch size and positions, so the same kernels."""
    first_B = torch.arange(len(images), device=images.device) % 2 == 0
    with torch.no_grad():
        together = model(images)
        first, second = (model(torch.where(own_B[:, None, None, None], images, noise)) for own_B in (first_B, ~first_B))
    return _compare(torch.where(first_B[:, None], first, second), together)


def _single_image_effect(model: nn.Module, images: Tensor) -> NeighbourEffect:
    """A few images, each in a batch of one."""
    with torch.no_grad():
        together = model(images)[:FEW]
        alone = torch.cat([model(image[None]) for image in images[:FEW]])
    return _compare(alone, together)


def _compare(logits_BK: Tensor, reference_BK: Tensor) -> NeighbourEffect:
    """Compares logits; changed decisions do not count where the two best classes tie within rounding."""
    logits_BK, reference_BK = logits_BK.double(), reference_BK.double()
    scale = float(reference_BK.abs().max())
    best_B2 = reference_BK.topk(2, dim=1).values
    clear_B = best_B2[:, 0] - best_B2[:, 1] > LOGIT_TOLERANCE * scale
    flipped_B = clear_B & (logits_BK.argmax(1) != reference_BK.argmax(1))
    change = (logits_BK - reference_BK).abs().nan_to_num(torch.inf)
    return NeighbourEffect(float(change.max()), int(flipped_B.sum()), scale)

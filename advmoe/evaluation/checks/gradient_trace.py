"""A plain ascent that looks at everything on its way: the model as it is, in float32, not folded, nothing caught.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from advmoe.attacks.ball import Ball
from advmoe.attacks.interface import cross_entropy, pixel_gradient
from advmoe.attacks.random_streams import ImageDraws
from advmoe.evaluation.checks.base import CheckContext
from advmoe.evaluation.checks.probe_attacks import ProbeSet

STEP = 0.25  # of epsilon


class GradientStep(NamedTuple):
    """Where the ascent is (B, C, H, W), what the model says there (B, K), and the gradient of the cross-entropy."""

    points: Tensor
    logits: Tensor
    gradient: Tensor


def ascend(case: CheckContext, probe: ProbeSet, purpose: str) -> Iterator[GradientStep]:
    """The clean images, then a random point of each ball and all steps of a probe from there.

    The caller freezes the model.
    """
    model, ball = case.target.model, case.terms.ball
    yield look(model, probe.images, probe.labels)
    points = ball.start(probe.images, ImageDraws(case.terms.seed, f"check-{purpose}", probe.rows))
    for _ in range(case.probes.steps):
        seen = look(model, points, probe.labels)
        yield seen
        points = step(ball, seen, probe.images)


def step(ball: Ball, seen: GradientStep, images: Tensor) -> Tensor:
    """Onward from there; a gradient that is no number leads nowhere."""
    direction = ball.steepest(seen.gradient.nan_to_num(0.0, 0.0, 0.0))
    return ball.project(seen.points + STEP * ball.epsilon * direction, images)


def look(model: nn.Module, points: Tensor, labels: Tensor) -> GradientStep:
    """What the model says at the points and the gradient of its cross-entropy there."""
    gradient, logits = pixel_gradient(model, points, lambda logits: cross_entropy(logits.float(), labels))
    return GradientStep(points, logits, gradient)


def vanished(gradient_BCHW: Tensor) -> Tensor:
    """Where every pixel's gradient is exactly 0 (B,)."""
    return (gradient_BCHW == 0).flatten(1).all(dim=1)

"""A plain gradient ascent on the unmodified model in float32 that yields logits and gradients of every step.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from advmoe.attacks.ball import Ball
from advmoe.attacks.interface import cross_entropy, pixel_gradient
from advmoe.attacks.random_streams import ImageStreams
from advmoe.evaluation.checks.base import CheckContext
from advmoe.evaluation.checks.probe_attacks import ProbeSet

STEP_SIZE = 0.25  # of epsilon


class GradientStep(NamedTuple):
    """Points (B, C, H, W) of an ascent, their logits (B, K), and the gradient of the cross-entropy (B, C, H, W)."""

    points: Tensor
    logits: Tensor
    gradient: Tensor


def trace_ascent(context: CheckContext, probe: ProbeSet, purpose: str) -> Iterator[GradientStep]:
    """Yields the clean images, then a random point of each ball and `settings.steps` - 1 steps from there.

    The caller puts the model in eval mode (`inference.eval_mode`).
    """
    model, ball = context.target.model, context.config.ball
    yield gradient_at(model, probe.images, probe.labels)
    points = ball.start(probe.images, ImageStreams(context.config.seed, f"check-{purpose}", probe.rows))
    for _ in range(context.settings.steps):
        current = gradient_at(model, points, probe.labels)
        yield current
        points = next_points(ball, current, probe.images)


def next_points(ball: Ball, current: GradientStep, images: Tensor) -> Tensor:
    """Returns the points after one step; NaN and infinite gradients count as 0."""
    direction = ball.steepest(current.gradient.nan_to_num(0.0, 0.0, 0.0))
    return ball.project(current.points + STEP_SIZE * ball.epsilon * direction, images)


def gradient_at(model: nn.Module, points: Tensor, labels: Tensor) -> GradientStep:
    """Returns logits and the gradient of the cross-entropy at the points."""
    gradient, logits = pixel_gradient(model, points, lambda logits: cross_entropy(logits.float(), labels))
    return GradientStep(points, logits, gradient)


def is_zero(gradient_BCHW: Tensor) -> Tensor:
    """Returns where the gradient of every pixel is exactly 0 (B,) bool."""
    return (gradient_BCHW == 0).flatten(1).all(dim=1)

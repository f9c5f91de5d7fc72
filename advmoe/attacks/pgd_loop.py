"""Projected gradient ascent: the loop shared by PGD and the gate-aware attacks, which differ in their objective.

Shapes: B batch, b images still under attack, C channel, H/W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import IsAdversarial, confirm_adversarial

# (points (b, C, H, W), rows (b,) of the batch they belong to) -> gradient to follow, and which points are candidates
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class GradientAscent:
    """The images of one batch and their results; every ascent runs on the images still under attack (`active`)."""

    def __init__(self, images_BCHW: Tensor, labels_B: Tensor, ball: Ball, is_adversarial: IsAdversarial | None) -> None:
        self.images, self.labels, self.ball, self.is_adversarial = images_BCHW, labels_B, ball, is_adversarial
        self.result = images_BCHW.clone()
        self.active = torch.arange(len(images_BCHW), device=images_BCHW.device)

    def run(self, objective: Objective, steps: int, step_size: float, draws: RandomStream) -> None:
        """Runs `steps` steps of `step_size` * epsilon from a random start, for the images still under attack.

        With `is_adversarial`, an image leaves at the first candidate that it confirms; at the end it checks all
        remaining points.
        """
        ball, rows = self.ball, self.active
        if not len(rows):
            return
        points = ball.start(self.images[rows], draws.pick(rows))
        for _ in range(steps):
            gradient, candidates = objective(points, rows)
            if self.is_adversarial is not None:
                adversarial = confirm_adversarial(candidates, points, self.labels[rows], self.is_adversarial)
                self.result[rows[adversarial]] = points[adversarial]
                points, rows, gradient = points[~adversarial], rows[~adversarial], gradient[~adversarial]
                if not len(rows):
                    break
            points = ball.project(points + step_size * ball.epsilon * ball.steepest(gradient), self.images[rows])
        self.result[rows] = points
        if self.is_adversarial is not None:
            everything = torch.ones_like(rows, dtype=torch.bool)
            rows = rows[~confirm_adversarial(everything, points, self.labels[rows], self.is_adversarial)]
        self.active = rows

"""Projected gradient ascent, the core of PGD and of the gate-aware attacks, which differ in what they climb.

Shapes: B batch, b images still open, C channel, H/W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, confirmed

# (points (b, C, H, W), rows (b,) of the batch they belong to) -> gradient to follow, and which points look adversarial
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class GradientAscent:
    """The images of one batch and the best that is known of each; every ascent takes on those that still stand."""

    def __init__(self, images_BCHW: Tensor, labels_B: Tensor, ball: Ball, fooled: IsAdversarial | None) -> None:
        self.images, self.labels, self.ball, self.fooled = images_BCHW, labels_B, ball, fooled
        self.result = images_BCHW.clone()
        self.open = torch.arange(len(images_BCHW), device=images_BCHW.device)

    def ascend(self, objective: Objective, steps: int, step_size: float, draws: Draws) -> None:
        """`steps` steps of `step_size` * epsilon from a random start, for the images still open.

        With a `fooled`, an image closes at the first point that looks adversarial and is confirmed; at the end it is
        asked about all that are left.
        """
        ball, rows = self.ball, self.open
        if not len(rows):
            return
        points = ball.start(self.images[rows], draws.pick(rows))
        for _ in range(steps):
            gradient, suspect = objective(points, rows)
            if self.fooled is not None:
                fallen = confirmed(suspect, points, self.labels[rows], self.fooled)
                self.result[rows[fallen]] = points[fallen]
                points, rows, gradient = points[~fallen], rows[~fallen], gradient[~fallen]
                if not len(rows):
                    break
            points = ball.project(points + step_size * ball.epsilon * ball.steepest(gradient), self.images[rows])
        self.result[rows] = points
        if self.fooled is not None:
            all_left = torch.ones_like(rows, dtype=torch.bool)
            rows = rows[~confirmed(all_left, points, self.labels[rows], self.fooled)]
        self.open = rows

"""Unlearnable examples: error-minimising noise leaves nothing to learn (Huang et al. 2021, arXiv 2101.04898).

A network learns from the noisy images for a few steps, then the noise is improved until the network is right about
them, and so on: what the noise explains, the images need not.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from advmoe import engine
from advmoe.params import Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.threats.poisoning.noise import towards
from advmoe.threats.poisoning.poisoned import Poisoned, change, choose, count, to_levels

MOMENTUM, DECAY = 0.9, 5e-4  # of the learning network, as in the paper


class Unlearnable(Settings):
    """`steps` of `step_size` (relative to `epsilon`, L-inf) improve the noise in each of at most `rounds`, after
    `learning_steps` of SGD with `batch_size` images at rate `lr`; it ends when the network errs on a share `stop`.
    """

    kind: Literal["unlearnable"]
    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat
    rounds: PositiveInt
    learning_steps: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    lr: PositiveFloat
    stop: Annotated[float, Field(ge=0, lt=1)]


def unlearnable(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    settings: Unlearnable,
    *,
    rate: float,
    fresh: nn.Module,
) -> Poisoned:
    """Noise of its own on every chosen image, labels true. `fresh`: an untrained network, which this trains."""
    of = "the training set"
    rows = choose(torch.arange(len(labels_N)), count(rate, len(labels_N), of), of, stream)
    images, labels = images_NCHW[rows].float() / 255, labels_N[rows]
    start = (torch.rand(images.shape, generator=stream) * 2 - 1) * settings.epsilon
    points = (images + start).clamp(0, 1)
    learner = _Learner(fresh, settings, stream)
    for _ in range(settings.rounds):
        learner.learn(points, labels)
        points = towards(
            fresh,
            images,
            points,
            labels,
            epsilon=settings.epsilon,
            steps=settings.steps,
            step_size=settings.step_size,
        )
        if learner.error(points, labels) <= settings.stop:
            break
    new_images = to_levels(points, images_NCHW[rows], settings.epsilon)
    return change(images_NCHW, labels_N, rows, of=of, available=len(labels_N), new_images=new_images)


class _Learner:
    """The network that the noise is made for, and its optimiser."""

    def __init__(self, model: nn.Module, settings: Unlearnable, stream: torch.Generator) -> None:
        self.model, self.settings, self.stream = model, settings, stream
        self.place = next(model.parameters()).device
        self.optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=MOMENTUM, weight_decay=DECAY)

    def learn(self, points: Tensor, labels: Tensor) -> None:
        """Some steps of SGD."""
        self.model.train()
        for _ in range(self.settings.learning_steps):
            batch = torch.randint(len(labels), (self.settings.batch_size,), generator=self.stream)
            self.optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(self.model(points[batch].to(self.place)), labels[batch].to(self.place))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.model.eval()

    def error(self, points: Tensor, labels: Tensor) -> float:
        """Share of the noisy images that the network gets wrong."""
        predicted = engine.predict(self.model, points.to(self.place), self.settings.batch_size).argmax(1).cpu()
        return float((predicted != labels).float().mean())

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
from advmoe.params import PositiveFloat, PositiveInt
from advmoe.threats.poisoning.noise import Noise, noisy, towards
from advmoe.threats.poisoning.poisoned import Poisoned

MOMENTUM, DECAY = 0.9, 5e-4  # of the learning network, as in the paper


class Unlearnable(Noise):
    """The steps improve the noise in each of at most `rounds`, after
    `learning_steps` of SGD with `batch_size` images at rate `lr`; it ends when the network errs on a share `stop`.
    """

    kind: Literal["unlearnable"]
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
    learner = _Learner(fresh, settings, stream)

    def make(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        for _ in range(settings.rounds):
            learner.learn(points, labels)
            points = towards(fresh, images, points, labels, settings)
            if learner.error(points, labels) <= settings.stop:
                break
        return points

    return noisy(images_NCHW, labels_N, stream, rate, settings.epsilon, make)


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

"""Unlearnable examples: error-minimising noise leaves nothing to learn (Huang et al. 2021, arXiv 2101.04898).

A network learns from the noisy images for a few steps, then the noise is improved until the network is right about
them, and so on: what the noise explains, the images need not.

On digits-full that takes 16 s on one core, the other attacks that craft 6 s at most; with the paper's numbers on
CIFAR-10 50 million gradients, of which no other takes a quarter. So a killed attacker goes on here with the next round,
there with the next set.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.settings import PositiveFloat, PositiveInt
from advmoe.models import inference
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback
from advmoe.runtime.checkpoints.storage import Checkpoint, flatten, load_optimizer_state, optimizer_state, unflatten
from advmoe.threats.poisoning.perturbation import Noise, noisy, towards
from advmoe.threats.poisoning.poisoned_set import Poisoned

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
    keep: Callable[[Resumable], AbstractContextManager[StepCallback]],
) -> Poisoned:
    """Noise of its own on every chosen image, labels true. `fresh`: an untrained network, which this trains; `keep`:
    puts the work where a killed one left it, see `advmoe.runtime.checkpoints.manager`.
    """

    def make(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        crafting = _Crafting(fresh, settings, stream, points)
        with keep(crafting) as look:
            while not crafting.is_over:
                crafting.round(images, labels)
                look()
        return crafting.points

    return noisy(images_NCHW, labels_N, stream, rate, settings.epsilon, make)


class _Crafting:
    """The network that the noise is made for, its optimiser, and the noisy images so far."""

    def __init__(self, model: nn.Module, settings: Unlearnable, stream: torch.Generator, points: Tensor) -> None:
        self.model, self.settings, self.stream, self.points = model, settings, stream, points
        self.place = next(model.parameters()).device
        self.optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=MOMENTUM, weight_decay=DECAY)
        self.rounds, self.error = 0, 1.0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to learn, or no time."""
        return self.rounds >= self.settings.rounds or self.error <= self.settings.stop

    def round(self, images: Tensor, labels: Tensor) -> None:
        """Learn from the noisy images, then let the noise explain more of them."""
        self._learn(labels)
        self.points = towards(self.model, images, self.points, labels, self.settings)
        self.rounds, self.error = self.rounds + 1, self._share_wrong(labels)

    def _learn(self, labels: Tensor) -> None:
        """Some steps of SGD."""
        self.model.train()
        for _ in range(self.settings.learning_steps):
            batch = torch.randint(len(labels), (self.settings.batch_size,), generator=self.stream)
            self.optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(self.model(self.points[batch].to(self.place)), labels[batch].to(self.place))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.model.eval()

    def _share_wrong(self, labels: Tensor) -> float:
        predicted = inference.predict(self.model, self.points.to(self.place), self.settings.batch_size).argmax(1).cpu()
        return float((predicted != labels).float().mean())

    # ---- to be killed and go on, to the last bit the same

    @property
    def position(self) -> tuple[int, ...]:
        """How many rounds are done."""
        return (self.rounds,)

    @property
    def progress(self) -> str:
        """The same in words."""
        return f"{self.rounds} rounds"

    def state(self) -> Checkpoint:
        """All that changes from round to round."""
        parts = {
            "model": self.model.state_dict(),
            "momentum": optimizer_state(self.optimizer),
            "own": {"points": self.points, "stream": self.stream.get_state()},
        }
        return Checkpoint(flatten(parts), {"rounds": self.rounds, "error": self.error})

    def restore(self, snapshot: Checkpoint) -> None:
        """Be as at that moment."""
        parts, values = unflatten(snapshot.tensors), snapshot.values
        self.model.load_state_dict(parts["model"])
        self.model.eval()
        load_optimizer_state(self.optimizer, parts["momentum"])
        self.points = parts["own"]["points"]
        self.stream.set_state(parts["own"]["stream"])
        self.rounds, self.error = values["rounds"], values["error"]

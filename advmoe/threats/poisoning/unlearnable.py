"""Unlearnable examples: error-minimising perturbations of the training images (Huang et al. 2021, arXiv 2101.04898).

Training of a network on the perturbed images alternates with gradient steps on the perturbations that lower the
network's loss. A victim can then fit the perturbations instead of the images.

On digits-full this takes 16 s on one core, every other attack at most 6 s; with the paper's settings on CIFAR-10 it
takes 50 million gradients, no other attack a quarter of that. An interrupted run therefore continues after the last
complete round here, and after the last complete poisoned set for other attacks.
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
from advmoe.threats.poisoning.perturbation import PerturbationSettings, perturb_images, perturb_towards_labels
from advmoe.threats.poisoning.poisoned_set import PoisonedSet

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD on the network, as in the paper


class Unlearnable(PerturbationSettings):
    """Each of at most `rounds` trains the network for `learning_steps` of SGD with `batch_size` images at learning rate
    `lr`, then improves the perturbations by `steps`; the attack ends when the network's error rate is at most `stop`.
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
    network: nn.Module,
    checkpointing: Callable[[Resumable], AbstractContextManager[StepCallback]],
) -> PoisonedSet:
    """Perturbs every poisoned image; labels are unchanged.

    `network`: an untrained network, which is trained in place; `checkpointing`: makes the optimization resumable, see
    `advmoe.runtime.checkpoints.manager`.
    """

    def craft(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        optimization = _NoiseOptimization(network, settings, stream, points)
        with checkpointing(optimization) as on_step_end:
            while not optimization.is_done:
                optimization.run_round(images, labels)
                on_step_end()
        return optimization.points

    return perturb_images(images_NCHW, labels_N, stream, rate, settings.epsilon, craft)


class _NoiseOptimization:
    """Alternating optimization of a network and of the perturbed images `points`."""

    def __init__(self, model: nn.Module, settings: Unlearnable, stream: torch.Generator, points: Tensor) -> None:
        self.model, self.settings, self.stream, self.points = model, settings, stream, points
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.rounds, self.error = 0, 1.0

    @property
    def is_done(self) -> bool:
        """Whether the error rate is low enough or all rounds are done."""
        return self.rounds >= self.settings.rounds or self.error <= self.settings.stop

    def run_round(self, images: Tensor, labels: Tensor) -> None:
        """Trains the network on the perturbed images, then improves the perturbations."""
        self._train_network(labels)
        self.points = perturb_towards_labels(self.model, images, self.points, labels, self.settings)
        self.rounds, self.error = self.rounds + 1, self._error_rate(labels)

    def _train_network(self, labels: Tensor) -> None:
        """Trains the network for `learning_steps` of SGD."""
        self.model.train()
        for _ in range(self.settings.learning_steps):
            batch = torch.randint(len(labels), (self.settings.batch_size,), generator=self.stream)
            self.optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(
                self.model(self.points[batch].to(self.device)), labels[batch].to(self.device)
            )
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.model.eval()

    def _error_rate(self, labels: Tensor) -> float:
        predicted = inference.predict(self.model, self.points.to(self.device), self.settings.batch_size).argmax(1).cpu()
        return float((predicted != labels).float().mean())

    # ---- resume: the interface `Resumable`

    @property
    def position(self) -> tuple[int, ...]:
        """Number of completed rounds."""
        return (self.rounds,)

    @property
    def progress(self) -> str:
        """The position in words."""
        return f"{self.rounds} rounds"

    def checkpoint(self) -> Checkpoint:
        """Returns everything that changes from round to round."""
        parts = {
            "model": self.model.state_dict(),
            "momentum": optimizer_state(self.optimizer),
            "own": {"points": self.points, "stream": self.stream.get_state()},
        }
        return Checkpoint(flatten(parts), {"rounds": self.rounds, "error": self.error})

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores the state of a checkpoint, bit for bit."""
        parts, values = unflatten(checkpoint.tensors), checkpoint.values
        self.model.load_state_dict(parts["model"])
        self.model.eval()
        load_optimizer_state(self.optimizer, parts["momentum"])
        self.points = parts["own"]["points"]
        self.stream.set_state(parts["own"]["stream"])
        self.rounds, self.error = values["rounds"], values["error"]

"""Where attacks run: the model made cheap to differentiate, in batches, and every success checked in float32.

Training and evaluation use this alike. A frozen eval-mode model needs no gradients for its weights, its BatchNorms fold
into the convolutions, and input gradients survive bfloat16; a *decision* does not, so an image counts as fooled only
where a float32 forward pass says so.

Shapes: B batch, N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.cuda_graphs import GraphedModule
from advmoe.attacks.interface import AttackFn, Model
from advmoe.attacks.random_streams import ImageDraws
from advmoe.core.errors import UserError, first_line
from advmoe.models.grouped_experts import grouped
from advmoe.models.inference import Precision, autocast, eval_mode, predict
from advmoe.models.layers import folded
from advmoe.models.mixture import Mixing, MixtureOfExperts, MixtureOutput
from advmoe.runtime.machine import machine


@dataclass
class PassCount:
    """Work done, in images: forward passes, and backward passes to the pixels."""

    forward: int = 0
    backward: int = 0


class FrozenModel:
    """A frozen network in the form attacks want: channels_last, in the chosen precision, float32 logits, counted."""

    def __init__(self, network: nn.Module, precision: Precision, passes: PassCount) -> None:
        self.network, self.precision, self.passes = network, precision, passes
        self.forward = _compiled(network) if machine().compile else network
        self.replayed = GraphedModule(network) if machine().graphs and not machine().compile else self.forward

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        self._count(images_BCHW)
        forward = self.replayed if images_BCHW.is_cuda else self.forward
        # folded weights are cast already, and a recording must not write into a cache that ends with this pass
        with autocast(images_BCHW.device, self.precision, cache=False):
            output: Tensor = forward(images_BCHW.contiguous(memory_format=torch.channels_last))
        return output.float()

    @property
    def mixing(self) -> Mixing:
        """How a mixture weighs its votes."""
        return self._mixture().mixing

    def parts(self, images_BCHW: Tensor) -> MixtureOutput:
        """A mixture's forward pass taken apart, in float32."""
        self._count(images_BCHW)
        with autocast(images_BCHW.device, self.precision):
            parts = self._mixture().parts(images_BCHW.contiguous(memory_format=torch.channels_last))
        return MixtureOutput(*(part.float() for part in parts))

    def votes(self) -> list[Model]:
        """Each expert of a mixture as a model of its own; a pass through one counts as a pass."""
        return [FrozenModel(expert, self.precision, self.passes) for expert in self._mixture().experts]

    def _mixture(self) -> MixtureOfExperts:
        assert isinstance(self.network, MixtureOfExperts), "the catalogue lets gate-aware attacks meet mixtures only"
        return self.network

    def _count(self, images_BCHW: Tensor) -> None:
        self.passes.forward += len(images_BCHW)
        if torch.is_grad_enabled() and images_BCHW.requires_grad:
            self.passes.backward += len(images_BCHW)


def _compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward pass rewritten by PyTorch. A new wrapper finds what was compiled for another: code and shapes count,
    and weights are inputs.
    """
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415  (seconds, for those who asked)

    forward = torch.compile(network)

    def call(images_BCHW: Tensor) -> Tensor:
        try:
            output: Tensor = forward(images_BCHW)
        except TorchDynamoException as error:
            raise UserError(
                f"environment: ADVMOE_COMPILE is set, but PyTorch cannot compile here ({first_line(error)})"
            ) from error
        return output

    return call


@contextmanager
def attack_mode(model: nn.Module, precision: Precision, passes: PassCount | None = None) -> Iterator[FrozenModel]:
    """`model` frozen, folded, in `precision`, for attacks."""
    # a compiler that meets other objects every time compiles every time, and has its own ways to save calls
    with eval_mode(model), folded(model), nullcontext() if machine().compile else grouped(model):
        yield FrozenModel(model, precision, passes or PassCount())


@dataclass(frozen=True)
class AttackResult:
    """Adversarial images (B, C, H, W) inside the ball, and how far (B,) the attack's own were outside, L-inf."""

    images: Tensor
    overshoot: Tensor


def run_attack(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    craft: AttackFn,
    *,
    ball: Ball,
    draws: Draws,
    precision: Precision,
    passes: PassCount | None = None,
) -> AttackResult:
    """One batch attacked, and brought back into the ball whatever the attack says of its images.

    An image leaves the attack at its first point that a float32 forward pass gets wrong.
    """
    passes = passes or PassCount()

    def fooled(points: Tensor, labels: Tensor) -> Tensor:
        if not len(points):
            return torch.zeros(0, dtype=torch.bool, device=points.device)
        passes.forward += len(points)
        return predict(model, points, len(points)).argmax(1) != labels

    with attack_mode(model, precision, passes) as cheap:
        # copies: what an attack writes into its inputs must not move the centre of the ball
        found = craft(cheap, images_BCHW.clone(), labels_B.clone(), ball=ball, draws=draws, fooled=fooled).detach()
    inside = ball.project(found, images_BCHW)
    return AttackResult(inside, (found - inside).abs().amax(dim=(1, 2, 3)))


def attack_dataset(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    standing_N: Tensor,
    craft: AttackFn,
    *,
    ball: Ball,
    seed: int,
    purpose: str,
    precision: Precision,
    batch_size: int,
) -> Tensor:
    """The images (N, C, H, W), those still `standing` (N,) attacked in batches; every image has a stream of its own."""
    result = images_NCHW.clone()
    for rows in torch.split(standing_N.nonzero().squeeze(1), batch_size):
        draws = ImageDraws(seed, purpose, rows)
        struck = run_attack(
            model, images_NCHW[rows], labels_N[rows], craft, ball=ball, draws=draws, precision=precision
        )
        result[rows] = struck.images
    return result


def attack_without_early_stop(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    craft: AttackFn,
    *,
    ball: Ball,
    seed: int,
    purpose: str,
    precision: Precision,
    batch_size: int,
) -> Tensor:
    """All images (N, C, H, W) after every step of an attack: what just fools one network seldom fools another."""
    found = []
    with attack_mode(model, precision) as cheap:
        for rows in torch.split(torch.arange(len(labels_N), device=labels_N.device), batch_size):
            draws = ImageDraws(seed, purpose, rows)
            found.append(craft(cheap, images_NCHW[rows], labels_N[rows], ball=ball, draws=draws).detach())
    return ball.project(torch.cat(found), images_NCHW)

"""Runs attacks: on a frozen, folded, mixed-precision copy of the forward pass, in batches, with checks in float32.

Used by training and evaluation. A frozen eval-mode model needs no gradients of its weights, and its BatchNorms fold
into the convolutions. bfloat16 is precise enough for input gradients but not for predictions, so an image counts as
adversarial only if a float32 forward pass misclassifies it.

Shapes: B batch, N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.cuda_graphs import GraphedModule
from advmoe.attacks.interface import AttackFn, Model
from advmoe.attacks.random_streams import ImageStreams
from advmoe.core.errors import UserError, error_summary
from advmoe.models.grouped_experts import group_experts
from advmoe.models.inference import Precision, autocast, eval_mode, predict
from advmoe.models.layers import fold_batchnorm
from advmoe.models.mixture import Mixing, MixtureOfExperts, MixtureOutput
from advmoe.runtime.machine import machine


@dataclass
class PassCount:
    """Number of images passed forward through a model, and backward to the pixels."""

    forward: int = 0
    backward: int = 0


class FrozenModel:
    """A frozen network as attacks call it: channels_last, mixed precision, float32 logits; counts passes."""

    def __init__(self, network: nn.Module, precision: Precision, passes: PassCount) -> None:
        self.network, self.precision, self.passes = network, precision, passes
        self.forward = _compiled(network) if machine().compile else network
        self.graphed = GraphedModule(network) if machine().graphs and not machine().compile else self.forward

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Returns the logits (B, K) in float32."""
        self._count(images_BCHW)
        forward = self.graphed if images_BCHW.is_cuda else self.forward
        # folded weights are cast already, and a CUDA graph must not use a cast cache that is freed after this pass
        with autocast(images_BCHW.device, self.precision, cache=False):
            output: Tensor = forward(images_BCHW.contiguous(memory_format=torch.channels_last))
        return output.float()

    @property
    def mixing(self) -> Mixing:
        """How the mixture combines its experts' outputs."""
        return self._mixture().mixing

    def forward_parts(self, images_BCHW: Tensor) -> MixtureOutput:
        """Returns the mixture's output with its intermediate results, in float32."""
        self._count(images_BCHW)
        with autocast(images_BCHW.device, self.precision):
            parts = self._mixture().forward_parts(images_BCHW.contiguous(memory_format=torch.channels_last))
        return MixtureOutput(*(part.float() for part in parts))

    def expert_models(self) -> list[Model]:
        """Returns each expert of the mixture as a model; a pass through an expert counts as one pass."""
        return [FrozenModel(expert, self.precision, self.passes) for expert in self._mixture().experts]

    def _mixture(self) -> MixtureOfExperts:
        assert isinstance(self.network, MixtureOfExperts), "gate-aware attacks need a mixture of experts"
        return self.network

    def _count(self, images_BCHW: Tensor) -> None:
        self.passes.forward += len(images_BCHW)
        if torch.is_grad_enabled() and images_BCHW.requires_grad:
            self.passes.backward += len(images_BCHW)


def _compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward pass under torch.compile. The compiled code is cached by code and shapes with weights as inputs, so a
    new wrapper reuses it.
    """
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415  (takes seconds; only with ADVMOE_COMPILE)

    forward = torch.compile(network)

    def call(images_BCHW: Tensor) -> Tensor:
        try:
            output: Tensor = forward(images_BCHW)
        except TorchDynamoException as error:
            raise UserError(
                f"environment: ADVMOE_COMPILE is set, but torch.compile failed ({error_summary(error)})"
            ) from error
        return output

    return call


@contextmanager
def attack_mode(model: nn.Module, precision: Precision, passes: PassCount | None = None) -> Iterator[FrozenModel]:
    """Eval mode, frozen weights, folded BatchNorm, grouped experts; yields the model for attacks in `precision`."""
    # torch.compile recompiles for every new object, and optimises the calls itself
    with eval_mode(model), fold_batchnorm(model), nullcontext() if machine().compile else group_experts(model):
        yield FrozenModel(model, precision, passes or PassCount())


def attack_batch(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    attack: AttackFn,
    *,
    ball: Ball,
    draws: RandomStream,
    precision: Precision,
    passes: PassCount | None = None,
) -> Tensor:
    """Returns a training batch (B, C, H, W) after all steps of an attack, without early stop and not projected onto the
    ball: N-FGSM leaves it on purpose. `passes` counts the work.
    """
    with attack_mode(model, precision, passes) as frozen:
        return attack(frozen, images_BCHW, labels_B, ball=ball, draws=draws)


@dataclass(frozen=True)
class AttackResult:
    """Adversarial images (B, C, H, W) inside the ball, and the L-inf distance (B,) by which projection moved them."""

    images: Tensor
    overshoot: Tensor


def run_attack(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    attack_fn: AttackFn,
    *,
    ball: Ball,
    draws: RandomStream,
    precision: Precision,
    passes: PassCount | None = None,
) -> AttackResult:
    """Attacks one batch and projects the result into the ball.

    An image leaves the attack at its first point that a float32 forward pass misclassifies.
    """
    passes = passes or PassCount()

    def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
        if not len(points):
            return torch.zeros(0, dtype=torch.bool, device=points.device)
        passes.forward += len(points)
        return predict(model, points, len(points)).argmax(1) != labels

    with attack_mode(model, precision, passes) as frozen_model:
        # copies: an attack that writes into its inputs must not move the centre of the ball
        points = attack_fn(
            frozen_model,
            images_BCHW.clone(),
            labels_B.clone(),
            ball=ball,
            draws=draws,
            is_adversarial=is_adversarial,
        ).detach()
    inside = ball.project(points, images_BCHW)
    return AttackResult(inside, (points - inside).abs().amax(dim=(1, 2, 3)))


def attack_dataset(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    selected_N: Tensor,
    attack_fn: AttackFn,
    *,
    ball: Ball,
    seed: int,
    purpose: str,
    precision: Precision,
    batch_size: int,
) -> Tensor:
    """Attacks the images with `selected_N` (N,) bool in batches; returns all images (N, C, H, W).

    Every image has its own random stream.
    """
    result = images_NCHW.clone()
    for rows in torch.split(selected_N.nonzero().squeeze(1), batch_size):
        draws = ImageStreams(seed, purpose, rows)
        attacked = run_attack(
            model, images_NCHW[rows], labels_N[rows], attack_fn, ball=ball, draws=draws, precision=precision
        )
        result[rows] = attacked.images
    return result


def attack_without_early_stop(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    attack_fn: AttackFn,
    *,
    ball: Ball,
    seed: int,
    purpose: str,
    precision: Precision,
    batch_size: int,
) -> Tensor:
    """Attacks all images (N, C, H, W) for all steps: stronger on other networks than the first adversarial point."""
    points = []
    with attack_mode(model, precision) as frozen_model:
        for rows in torch.split(torch.arange(len(labels_N), device=labels_N.device), batch_size):
            draws = ImageStreams(seed, purpose, rows)
            points.append(attack_fn(frozen_model, images_NCHW[rows], labels_N[rows], ball=ball, draws=draws).detach())
    return ball.project(torch.cat(points), images_NCHW)

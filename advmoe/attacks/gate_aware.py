"""Gate-aware attacks on mixtures of experts, and transfer attacks.

(a) end to end: any ordinary attack on the mixture. This module has the others:
(b) `gate-frozen`: maximises the mixture's loss with the gate weights fixed to those of the clean image;
(c) `misrouting`: maximises CE + lambda * gate loss, which rewards gate weight on experts that misclassify the image;
(d) `experts`: attacks each expert alone, success is checked on the mixture;
(e) `transfer`: attacks another network trained on the same data, success is checked on the model.
All run the ascent of PGD; success is always checked on the model under attack, not on the objective.

Shapes: B batch, b images still under attack, C channel, H/W pixels, E experts, K classes.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import IsAdversarial, Model, confirm_adversarial, cross_entropy
from advmoe.attacks.pgd import untargeted
from advmoe.attacks.pgd_loop import GradientAscent, Objective
from advmoe.core.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from advmoe.models.mixture import Mixing, MixtureOutput, mix


class GatedModel(Protocol):
    """A mixture of experts, as these attacks call it."""

    @property
    def mixing(self) -> Mixing:
        """How the experts' outputs are combined."""
        ...

    def __call__(self, images_BCHW: Tensor, /) -> Tensor:
        """Returns the logits (B, K)."""
        ...

    def forward_parts(self, images_BCHW: Tensor, /) -> MixtureOutput:
        """Returns the output with its intermediate results."""
        ...

    def expert_models(self) -> list[Model]:
        """Returns each expert as a model."""
        ...


class _AscentSettings(Settings):
    """`step_size` is relative to epsilon."""

    steps: PositiveInt
    step_size: PositiveFloat
    restarts: PositiveInt


class GateFrozen(_AscentSettings):
    """Settings of `gate_frozen`."""

    kind: Literal["gate-frozen"]


class Misrouting(_AscentSettings):
    """`lambdas`: weights of the gate loss, each with all restarts; 0 is PGD on the mixture."""

    kind: Literal["misrouting"]
    lambdas: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]


class Experts(_AscentSettings):
    """Settings of `experts`."""

    kind: Literal["experts"]


class Transfer(_AscentSettings):
    """`sources`: names of the networks to attack; the caller of `bind` provides them."""

    kind: Literal["transfer"]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]


def gate_frozen(
    model: GatedModel,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: GateFrozen,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Maximises the mixture's cross-entropy with the gate weights of the clean image; returns the last points."""
    with torch.no_grad():
        log_gate_BE = model.forward_parts(images_BCHW).log_gate_BE

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        def loss(parts: MixtureOutput) -> Tensor:
            return cross_entropy(mix(log_gate_BE[rows], parts.logits_BEK, model.mixing), labels_B[rows])

        return _parts_gradient(model, points, labels_B[rows], loss)

    ascent = GradientAscent(images_BCHW, labels_B, ball, is_adversarial)
    _run_restarts(ascent, objective, settings, draws)
    return ascent.result


def misrouting(
    model: GatedModel,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Misrouting,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Maximises CE + lambda * gate loss for one lambda after another; returns the last points."""
    ascent = GradientAscent(images_BCHW, labels_B, ball, is_adversarial)
    for weight in settings.lambdas:
        _run_restarts(ascent, _misrouting_objective(model, labels_B, weight), settings, draws)
    return ascent.result


def gate_loss(parts: MixtureOutput, labels_B: Tensor) -> Tensor:
    """Returns sum_e g_e * CE_e (B,): high where the gate gives weight to experts that are wrong.

    The experts' losses are detached: the gradient flows through the gate only.
    """
    experts = parts.logits_BEK.shape[1]
    labels_BE = labels_B[:, None].expand(-1, experts)
    losses_BE = functional.cross_entropy(parts.logits_BEK.detach().transpose(1, 2), labels_BE, reduction="none")
    return (parts.log_gate_BE.exp() * losses_BE).sum(dim=1)


def _misrouting_objective(model: GatedModel, labels_B: Tensor, weight: float) -> Objective:
    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels_B[rows]

        def loss(parts: MixtureOutput) -> Tensor:
            return cross_entropy(parts.log_probs_BK, labels) + weight * gate_loss(parts, labels)

        return _parts_gradient(model, points, labels, loss)

    return objective


def _parts_gradient(
    model: GatedModel, points: Tensor, labels: Tensor, loss: Callable[[MixtureOutput], Tensor]
) -> tuple[Tensor, Tensor]:
    """The input gradient of a loss (b,) of the mixture's output, and which points the mixture misclassifies."""
    with torch.enable_grad():
        pixels = points.detach().requires_grad_(True)
        parts = model.forward_parts(pixels)
        (gradient,) = torch.autograd.grad(loss(parts).sum(), pixels)
    return gradient, parts.log_probs_BK.detach().argmax(dim=1) != labels


def experts(
    model: GatedModel,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Experts,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Maximises the cross-entropy of each expert in turn; returns the last points."""
    return _attack_surrogates(
        model, model.expert_models(), images_BCHW, labels_B, ball, settings, draws, is_adversarial
    )


def transfer(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Transfer,
    draws: RandomStream,
    sources: Mapping[str, Model],
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Maximises the cross-entropy of other networks in turn; `sources` holds at least those that the settings name."""
    surrogates = [sources[name] for name in settings.sources]
    return _attack_surrogates(model, surrogates, images_BCHW, labels_B, ball, settings, draws, is_adversarial)


def _attack_surrogates(
    model: Model,
    surrogates: list[Model],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    settings: Experts | Transfer,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None,
) -> Tensor:
    """Attacks each surrogate. Points that it misclassifies are checked on the model first, then by `is_adversarial`."""
    ascent = GradientAscent(
        images, labels, ball, None if is_adversarial is None else _check_model_first(model, is_adversarial)
    )
    for surrogate in surrogates:
        _run_restarts(ascent, untargeted(surrogate, labels, "ce"), settings, draws)
    return ascent.result


def _check_model_first(model: Model, is_adversarial: IsAdversarial) -> IsAdversarial:
    """`is_adversarial`, called only for points that the model itself misclassifies: its float32 passes are costly."""

    def check(points: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wrong = model(points).argmax(dim=1) != labels
        return confirm_adversarial(wrong, points, labels, is_adversarial)

    return check


def _run_restarts(ascent: GradientAscent, objective: Objective, settings: _AscentSettings, draws: RandomStream) -> None:
    for _ in range(settings.restarts):
        ascent.run(objective, settings.steps, settings.step_size, draws)

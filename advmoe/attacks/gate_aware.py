"""Attacks that know of the gate: a mixture has more to attack than its output.

(a) end to end is any ordinary attack on the mixture. Here are the others:
(b) `gate-frozen`: climb the mixture with the gate weights it gives to the clean image, as if the gate could not move;
(c) `misrouting`: climb CE + lambda * gate loss, which pays for gate weight on experts that are wrong about the image;
(d) `experts`: craft on each expert alone, judge on the mixture;
(e) `transfer`: craft on another network trained on the same data, judge on the model.
All climb as PGD does, and every point that may count is judged by the model under attack, not by what is climbed.

Shapes: B batch, b images still open, C channel, H/W pixels, E experts, K classes.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Model, confirmed, cross_entropy
from advmoe.attacks.pgd import untargeted
from advmoe.attacks.pgd_loop import GradientAscent, Objective
from advmoe.core.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from advmoe.models.mixture import Mixing, MixtureOutput, mix


class GatedModel(Protocol):
    """A mixture in the form these attacks want."""

    @property
    def mixing(self) -> Mixing:
        """How the votes are weighed."""
        ...

    def __call__(self, images_BCHW: Tensor, /) -> Tensor:
        """Logits (B, K)."""
        ...

    def parts(self, images_BCHW: Tensor, /) -> MixtureOutput:
        """The forward pass with its intermediate results."""
        ...

    def votes(self) -> list[Model]:
        """Each expert as a model of its own."""
        ...


class _Ascent(Settings):
    """`step_size` is relative to epsilon."""

    steps: PositiveInt
    step_size: PositiveFloat
    restarts: PositiveInt


class GateFrozen(_Ascent):
    """Cross-entropy of the mixture under the clean image's gate weights."""

    kind: Literal["gate-frozen"]


class Misrouting(_Ascent):
    """`lambdas`: weights of the gate loss, each with all restarts; 0 is the plain attack."""

    kind: Literal["misrouting"]
    lambdas: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]


class Experts(_Ascent):
    """Each expert alone, one after another."""

    kind: Literal["experts"]


class Transfer(_Ascent):
    """`sources`: names of the networks to craft on; the harness says which there are."""

    kind: Literal["transfer"]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]


def gate_frozen(
    model: GatedModel,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: GateFrozen,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Where the ascent with a gate that cannot move ends; the mixture that judges it has a gate that can."""
    with torch.no_grad():
        log_gate_BE = model.parts(images_BCHW).log_gate_BE

    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        def loss(parts: MixtureOutput) -> Tensor:
            return cross_entropy(mix(log_gate_BE[rows], parts.logits_BEK, model.mixing), labels_B[rows])

        return _climb_parts(model, points, labels_B[rows], loss)

    climb = GradientAscent(images_BCHW, labels_B, ball, fooled)
    _restarts(climb, objective, settings, draws)
    return climb.result


def misrouting(
    model: GatedModel,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Misrouting,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Where the ascents on CE + lambda * gate loss end, one lambda after another."""
    climb = GradientAscent(images_BCHW, labels_B, ball, fooled)
    for weight in settings.lambdas:
        _restarts(climb, _misroute(model, labels_B, weight), settings, draws)
    return climb.result


def gate_loss(parts: MixtureOutput, labels_B: Tensor) -> Tensor:
    """sum_e g_e * CE_e (B,): high where the gate trusts experts that are wrong. Only the gate is to be moved by it:
    the experts' losses are taken as they are.
    """
    experts = parts.logits_BEK.shape[1]
    labels_BE = labels_B[:, None].expand(-1, experts)
    losses_BE = functional.cross_entropy(parts.logits_BEK.detach().transpose(1, 2), labels_BE, reduction="none")
    return (parts.log_gate_BE.exp() * losses_BE).sum(dim=1)


def _misroute(model: GatedModel, labels_B: Tensor, weight: float) -> Objective:
    def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels_B[rows]

        def loss(parts: MixtureOutput) -> Tensor:
            return cross_entropy(parts.log_probs_BK, labels) + weight * gate_loss(parts, labels)

        return _climb_parts(model, points, labels, loss)

    return objective


def _climb_parts(
    model: GatedModel, points: Tensor, labels: Tensor, loss: Callable[[MixtureOutput], Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradient of a loss (b,) of the mixture's parts, and which points the mixture as a whole gets wrong."""
    with torch.enable_grad():
        pixels = points.detach().requires_grad_(True)
        parts = model.parts(pixels)
        (gradient,) = torch.autograd.grad(loss(parts).sum(), pixels)
    return gradient, parts.log_probs_BK.detach().argmax(dim=1) != labels


def experts(
    model: GatedModel,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Experts,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Where the ascents on the experts' own losses end."""
    return _borrowed(model, model.votes(), images_BCHW, labels_B, ball, settings, draws, fooled)


def transfer(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Transfer,
    draws: Draws,
    sources: Mapping[str, Model],
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Where the ascents on other networks end; `sources` holds at least those that the settings name."""
    surrogates = [sources[name] for name in settings.sources]
    return _borrowed(model, surrogates, images_BCHW, labels_B, ball, settings, draws, fooled)


def _borrowed(
    model: Model,
    surrogates: list[Model],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    settings: Experts | Transfer,
    draws: Draws,
    fooled: IsAdversarial | None,
) -> Tensor:
    """Climb each surrogate. Points it gets wrong are shown to the model, and only what fools that to the caller."""
    climb = GradientAscent(images, labels, ball, None if fooled is None else _first_asking(model, fooled))
    for surrogate in surrogates:
        _restarts(climb, untargeted(surrogate, labels, "ce"), settings, draws)
    return climb.result


def _first_asking(model: Model, fooled: IsAdversarial) -> IsAdversarial:
    """`fooled`, asked only about what the model itself gets wrong: its float32 passes are the dear ones."""

    def asked(points: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wrong = model(points).argmax(dim=1) != labels
        return confirmed(wrong, points, labels, fooled)

    return asked


def _restarts(climb: GradientAscent, objective: Objective, settings: _Ascent, draws: Draws) -> None:
    for _ in range(settings.restarts):
        climb.ascend(objective, settings.steps, settings.step_size, draws)

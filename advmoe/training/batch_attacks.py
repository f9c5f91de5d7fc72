"""Randomised adversarial training: the attack on each batch is drawn at random (arXiv 2512.20821).

It is drawn once per batch, not per image and not per epoch; a test checks that. `advmoe.attacks.engine` runs it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, model_validator

from advmoe.attacks.ball import LInf
from advmoe.attacks.fgsm import Fgsm, fgsm
from advmoe.attacks.interface import AttackFn
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.core.settings import Epsilon, NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from advmoe.training.nfgsm import NFgsm, nfgsm
from advmoe.training.trades import Trades, trades

T = TypeVar("T")


class CleanBatches(Settings):
    """No attack."""

    kind: Literal["clean"]


class FgsmBatches(Settings):
    """FGSM at an epsilon drawn from `epsilons`."""

    kind: Literal["fgsm"]
    epsilons: Annotated[tuple[Epsilon, ...], Field(min_length=1)]


class NFgsmBatches(Settings):
    """N-FGSM at the threat model's epsilon; `noise` and `step_size` relative to it (`advmoe.training.nfgsm`)."""

    kind: Literal["n-fgsm"]
    noise: PositiveFloat
    step_size: PositiveFloat


class PgdBatches(Settings):
    """PGD at the threat model's epsilon with a number of steps drawn from `steps`; `step_size` relative to epsilon."""

    kind: Literal["pgd"]
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    step_size: PositiveFloat


class PgdAtRadii(Settings):
    """PGD at a radius drawn from `radii` (relative to the threat model's epsilon), with a number of steps drawn from
    `steps`; `step_size` is relative to the drawn radius. For experts that specialise in small or large perturbations.
    """

    kind: Literal["pgd-radii"]
    radii: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    step_size: PositiveFloat


class TradesBatches(Settings):
    """TRADES' inner maximisation with a number of steps drawn from `steps`; `step_size` relative to epsilon. `beta` is
    the weight of the outer loss's second term (`advmoe.training.trades`).
    """

    kind: Literal["trades"]
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    step_size: PositiveFloat
    beta: PositiveFloat


class MixedBatches(Settings):
    """One of several kinds of batches, drawn with the given weights; its attack is drawn next."""

    kind: Literal["mixed"]
    weights: tuple[NonNegativeFloat, ...]
    of: tuple[
        Annotated[CleanBatches | FgsmBatches | NFgsmBatches | PgdBatches | PgdAtRadii, Field(discriminator="kind")],
        ...,
    ]

    @model_validator(mode="after")
    def _validate_weights(self) -> "MixedBatches":
        if len(self.weights) != len(self.of) or not sum(self.weights) > 0:
            raise ValueError(f"needs one weight for each of its {len(self.of)} kinds, and one above 0")
        return self


Adversary = Annotated[
    CleanBatches | FgsmBatches | NFgsmBatches | PgdBatches | PgdAtRadii | TradesBatches | MixedBatches,
    Field(discriminator="kind"),
]


class BatchAttack(NamedTuple):
    """The attack on one batch: its settings, and the ball around each image."""

    settings: Fgsm | NFgsm | Pgd | Trades
    ball: LInf

    @property
    def function(self) -> AttackFn:
        """The attack with its settings bound.

        The registry of attacks is not used: training would then depend on the code of all attacks.
        """
        match self.settings:
            case Fgsm():
                return partial(fgsm, settings=self.settings)
            case NFgsm():
                return partial(nfgsm, settings=self.settings)
            case Pgd():
                return partial(pgd, settings=self.settings)
            case Trades():
                return partial(trades, settings=self.settings)


def draw_attack(adversary: Adversary, epsilon: float, stream: torch.Generator) -> BatchAttack | None:
    """Draws the attack on one batch; returns None for a clean one. `epsilon` is the threat model's."""
    match adversary:
        case CleanBatches():
            return None
        case MixedBatches():
            chosen = torch.multinomial(torch.tensor(adversary.weights), 1, generator=stream)
            return draw_attack(adversary.of[int(chosen)], epsilon, stream)
        case FgsmBatches():
            return BatchAttack(Fgsm(kind="fgsm"), LInf(_choose(adversary.epsilons, stream)))
        case PgdAtRadii():
            return BatchAttack(_draw_settings(adversary, stream), LInf(epsilon * _choose(adversary.radii, stream)))
        case _:
            return BatchAttack(_draw_settings(adversary, stream), LInf(epsilon))


def expected_passes(adversary: Adversary) -> float:
    """Returns the forward (and backward) passes that attacking an image takes, on average over the draws."""
    match adversary:
        case CleanBatches():
            return 0.0
        case FgsmBatches() | NFgsmBatches():
            return 1.0
        case PgdBatches() | PgdAtRadii() | TradesBatches():
            return sum(adversary.steps) / len(adversary.steps)
        case MixedBatches():
            shares = [weight / sum(adversary.weights) for weight in adversary.weights]
            return sum(share * expected_passes(kind) for share, kind in zip(shares, adversary.of, strict=True))


def _draw_settings(
    adversary: NFgsmBatches | PgdBatches | PgdAtRadii | TradesBatches, stream: torch.Generator
) -> NFgsm | Pgd | Trades:
    if isinstance(adversary, NFgsmBatches):
        return NFgsm(kind="n-fgsm", noise=adversary.noise, step_size=adversary.step_size)
    steps = _choose(adversary.steps, stream)
    if isinstance(adversary, TradesBatches):
        return Trades(kind="trades", steps=steps, step_size=adversary.step_size)
    return Pgd(kind="pgd", steps=steps, step_size=adversary.step_size, restarts=1, loss="ce", targets=0)


def _choose(choices: Sequence[T], stream: torch.Generator) -> T:
    return choices[int(torch.randint(len(choices), (), generator=stream))]

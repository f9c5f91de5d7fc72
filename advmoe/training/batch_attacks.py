"""Randomised adversarial training: what each batch is attacked with is drawn (arXiv 2512.20821).

The draw is made once per batch, not per image and not per epoch; a test holds that.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import Draws, LInf
from advmoe.attacks.fgsm import Fgsm, fgsm
from advmoe.attacks.interface import AttackFn
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.core.settings import Epsilon, NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from advmoe.models import inference
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
    """The same at a radius drawn from `radii`, which are relative to the threat model's epsilon, as `step_size` is to
    the radius: experts that are prepared for less or for more.
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
    """One of several kinds, drawn with the given weights, then its own draw."""

    kind: Literal["mixed"]
    weights: tuple[NonNegativeFloat, ...]
    of: tuple[
        Annotated[CleanBatches | FgsmBatches | NFgsmBatches | PgdBatches | PgdAtRadii, Field(discriminator="kind")],
        ...,
    ]

    @model_validator(mode="after")
    def _one_weight_each(self) -> "MixedBatches":
        if len(self.weights) != len(self.of) or not sum(self.weights) > 0:
            raise ValueError(f"needs one weight for each of its {len(self.of)} kinds, and one above 0")
        return self


Adversary = Annotated[
    CleanBatches | FgsmBatches | NFgsmBatches | PgdBatches | PgdAtRadii | TradesBatches | MixedBatches,
    Field(discriminator="kind"),
]


class Drawn(NamedTuple):
    """The attack that one batch gets."""

    attack: Fgsm | NFgsm | Pgd | Trades
    ball: LInf


def bind(attack: Fgsm | NFgsm | Pgd | Trades) -> AttackFn:
    """The attack as a function. Not through the catalogue, or training would depend on every attack there is."""
    match attack:
        case Fgsm():
            return partial(fgsm, settings=attack)
        case NFgsm():
            return partial(nfgsm, settings=attack)
        case Pgd():
            return partial(pgd, settings=attack)
        case Trades():
            return partial(trades, settings=attack)


def craft(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    drawn: Drawn,
    draws: Draws,
    precision: inference.Precision,
    passes: engine.PassCount | None = None,
) -> Tensor:
    """Adversarial images for one training batch, every image attacked to the last step; `passes` counts the work."""
    with engine.attack_mode(model, precision, passes) as cheap:
        return bind(drawn.attack)(cheap, images_BCHW, labels_B, ball=drawn.ball, draws=draws)


def draw(adversary: Adversary, epsilon: float, stream: torch.Generator) -> Drawn | None:
    """Draw the attack of one batch; None for a clean one. `epsilon` is the threat model's."""
    match adversary:
        case CleanBatches():
            return None
        case MixedBatches():
            chosen = torch.multinomial(torch.tensor(adversary.weights), 1, generator=stream)
            return draw(adversary.of[int(chosen)], epsilon, stream)
        case FgsmBatches():
            return Drawn(Fgsm(kind="fgsm"), LInf(_pick(adversary.epsilons, stream)))
        case PgdAtRadii():
            return Drawn(_attack(adversary, stream), LInf(epsilon * _pick(adversary.radii, stream)))
        case _:
            return Drawn(_attack(adversary, stream), LInf(epsilon))


def expected_passes(adversary: Adversary) -> float:
    """Passes forwards and back to the pixels that an image is attacked with, on average over the draws."""
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


def _attack(
    adversary: NFgsmBatches | PgdBatches | PgdAtRadii | TradesBatches, stream: torch.Generator
) -> NFgsm | Pgd | Trades:
    if isinstance(adversary, NFgsmBatches):
        return NFgsm(kind="n-fgsm", noise=adversary.noise, step_size=adversary.step_size)
    steps = _pick(adversary.steps, stream)
    if isinstance(adversary, TradesBatches):
        return Trades(kind="trades", steps=steps, step_size=adversary.step_size)
    return Pgd(kind="pgd", steps=steps, step_size=adversary.step_size, restarts=1, loss="ce", targets=0)


def _pick(choices: Sequence[T], stream: torch.Generator) -> T:
    return choices[int(torch.randint(len(choices), (), generator=stream))]

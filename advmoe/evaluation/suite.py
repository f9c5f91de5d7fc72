"""The suite: which attacks a model meets, and what is kept of each meeting.

Shapes: N images, C channel, H/W pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from advmoe import console, engine
from advmoe.attacks.ball import Ball, LInf
from advmoe.attacks.catalogue import Attack
from advmoe.data.dataset import Split
from advmoe.engine import Precision
from advmoe.evaluation.intervals import Share
from advmoe.machine import device
from advmoe.params import Epsilon, PositiveInt, Settings

CLEAN = "clean"
WORST = "worst"


class Grid(Settings):
    """A fixed set of radii, so that experiments with different threat models can be compared."""

    epsilons: Annotated[tuple[Epsilon, ...], Field(min_length=1)]
    attack: Attack


class Evaluate(Settings):
    """`limit`: only the first so many images of the test split (it is shuffled), None for all."""

    limit: PositiveInt | None
    batch_size: PositiveInt
    precision: Precision
    baselines: tuple[str, ...]
    attacks: Annotated[dict[str, Attack], Field(min_length=1)]
    grid: Grid

    @field_validator("attacks")
    @classmethod
    def _names_are_free(cls, attacks: dict[str, Attack]) -> dict[str, Attack]:
        taken = {CLEAN, WORST} & attacks.keys()
        if taken:
            raise ValueError(f"'{taken.pop()}' is the name of a result, call the attack something else")
        return attacks


@dataclass(frozen=True)
class Measured:
    """What a model did: `correct` (N,) bool for `clean`, each attack and `worst` (all attacks, image by image);
    `predicted` (N,) labels and `images` (N, C, H, W) for each attack, on the CPU.
    """

    correct: dict[str, Tensor]
    predicted: dict[str, Tensor]
    images: dict[str, Tensor]

    def shares(self) -> dict[str, Share]:
        """Accuracies with intervals."""
        return {name: Share.of(correct) for name, correct in self.correct.items()}


def measure(
    name: str,
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, Attack],
    *,
    ball: Ball,
    batch_size: int,
    precision: Precision,
    seed: int,
) -> Measured:
    """Run every attack inside `ball` on all images of `split`; decisions are float32, in eval mode."""
    place = device()
    model = model.to(place)
    images, labels = split.pixels().to(place), split.labels.to(place)
    correct: dict[str, Tensor] = {}
    predicted: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for attack_name, attack in attacks.items():
        runs = engine.attack(model, images, labels, attack, ball, seed=seed, batch_size=batch_size, precision=precision)
        parts = list(console.track(runs, f"{name}: {attack_name}", -(-len(labels) // batch_size)))
        logits, clean_logits = (torch.cat([getattr(part, key) for part in parts]) for key in ("logits", "clean_logits"))
        predicted[CLEAN], predicted[attack_name] = clean_logits.argmax(1).cpu(), logits.argmax(1).cpu()
        correct[CLEAN] = predicted[CLEAN] == split.labels
        correct[attack_name] = correct[CLEAN] & (predicted[attack_name] == split.labels)
        found[attack_name] = torch.cat([part.images for part in parts]).cpu()
    correct[WORST] = torch.stack(list(correct.values())).all(dim=0)
    return Measured(correct, predicted, found)


def robustness_curve(
    name: str, model: nn.Module, split: Split, grid: Grid, *, batch_size: int, precision: Precision, seed: int
) -> Iterator[tuple[float, Share]]:
    """Yield (L-inf epsilon, accuracy) over the grid."""
    for epsilon in grid.epsilons:
        label = f"{name} at {epsilon:g}"
        measured = measure(
            label,
            model,
            split,
            {grid.attack.kind: grid.attack},
            ball=LInf(epsilon),
            batch_size=batch_size,
            precision=precision,
            seed=seed,
        )
        yield epsilon, measured.shares()[WORST]

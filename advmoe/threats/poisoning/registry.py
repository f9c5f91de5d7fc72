"""All poisoning attacks by name. A new one is a file beside this, a line in the union and a case below."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import nn

from advmoe.core.errors import UserError
from advmoe.core.settings import validate
from advmoe.data.batches import Augmentation
from advmoe.data.dataset import Split
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback
from advmoe.threats.poisoning.badnets import BadNets, badnets
from advmoe.threats.poisoning.blended import Blended, blended
from advmoe.threats.poisoning.error_maximising import ErrorMaximising, error_maximising
from advmoe.threats.poisoning.label_consistent import LabelConsistent, label_consistent
from advmoe.threats.poisoning.label_flip import PairFlip, RandomFlip, TargetedFlip, label_flip
from advmoe.threats.poisoning.poisoned_set import Poisoned
from advmoe.threats.poisoning.unlearnable import Unlearnable, unlearnable
from advmoe.threats.poisoning.witches_brew import WitchesBrew, witches_brew

AnyPoison = (
    RandomFlip
    | PairFlip
    | TargetedFlip
    | BadNets
    | Blended
    | LabelConsistent
    | WitchesBrew
    | Unlearnable
    | ErrorMaximising
)
Poison = Annotated[AnyPoison, Field(discriminator="kind")]
WHOLE_SET = (Unlearnable, ErrorMaximising)  # attacks that may change every image: a rate of 1


class Workshop(Protocol):
    """What an attacker has besides the training set."""

    @property
    def classes(self) -> int:
        """How many there are."""
        ...

    @property
    def augmentation(self) -> Augmentation:
        """The victims'."""
        ...

    @property
    def candidates(self) -> Split:
        """Images whose misclassification may be wanted."""
        ...

    def proxy(self, baseline: str) -> nn.Module:
        """A network of the attacker's own, trained on the clean set as that baseline is, from a seed of its own."""
        ...

    def fresh(self) -> nn.Module:
        """An untrained network."""
        ...

    def keep(self, work: Resumable) -> AbstractContextManager[StepCallback]:
        """Put long work where a killed one left it, see `advmoe.runtime.checkpoints.manager`."""
        ...


# attacks that need the data only, and those that need a trained network besides
PLAIN: dict[type[Any], Callable[..., Poisoned]] = {
    RandomFlip: label_flip,
    PairFlip: label_flip,
    TargetedFlip: label_flip,
    BadNets: badnets,
    Blended: blended,
}
PROXIED: dict[type[Any], Callable[..., Poisoned]] = {
    LabelConsistent: label_consistent,
    ErrorMaximising: error_maximising,
}


def poison(clean: Split, stream: torch.Generator, settings: AnyPoison, rate: float, workshop: Workshop) -> Poisoned:
    """The clean training set, poisoned. All that is random comes from `stream`. Raises UserError for what cannot be."""
    given, classes = (clean.images, clean.labels, stream, settings), workshop.classes
    match settings:
        case LabelConsistent() | ErrorMaximising():
            return PROXIED[type(settings)](*given, rate=rate, classes=classes, proxy=workshop.proxy(settings.proxy))
        case WitchesBrew():
            return witches_brew(
                clean.images,
                clean.labels,
                stream,
                settings,
                rate=rate,
                classes=classes,
                proxy=workshop.proxy(settings.proxy),
                augmentation=workshop.augmentation,
                candidates=workshop.candidates,
            )
        case Unlearnable():
            fresh, keep = workshop.fresh(), workshop.keep
            return unlearnable(clean.images, clean.labels, stream, settings, rate=rate, fresh=fresh, keep=keep)
        case _:
            return PLAIN[type(settings)](*given, rate=rate, classes=classes)


def trials(settings: AnyPoison) -> int:
    """How many poisoned sets there are at one rate and seed: witches' brew makes one for each of its targets."""
    return settings.targets if isinstance(settings, WitchesBrew) else 1


def proxies(settings: AnyPoison) -> tuple[str, ...]:
    """The baselines whose twins the attacker trains."""
    return (settings.proxy,) if isinstance(settings, LabelConsistent | WitchesBrew | ErrorMaximising) else ()


def aimed_at(settings: AnyPoison, target: int) -> AnyPoison:
    """The same attack with another target class. Raises UserError for an attack that has none of its own."""
    if "target" not in type(settings).model_fields:
        raise UserError(f"--target: {settings.kind} aims at no class")
    return validate(settings.model_dump() | {"target": target}, type(settings), "--target")

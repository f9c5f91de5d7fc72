"""Registry of poisoning attacks. To add one, add its file, an entry in the union and one in a table or case below."""

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
from advmoe.threats.poisoning.poisoned_set import PoisonedSet
from advmoe.threats.poisoning.unlearnable import Unlearnable, unlearnable
from advmoe.threats.poisoning.witches_brew import WitchesBrew, witches_brew

AnyPoisonAttack = (
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
PoisonAttack = Annotated[AnyPoisonAttack, Field(discriminator="kind")]
WHOLE_SET_ATTACKS = (Unlearnable, ErrorMaximising)  # attacks that allow a rate of 1, which poisons every image


class AttackContext(Protocol):
    """What is available to an attacker besides the training set."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def augmentation(self) -> Augmentation:
        """Augmentation in the training of the victims."""
        ...

    @property
    def candidates(self) -> Split:
        """Images that an attack may choose as its target."""
        ...

    def proxy(self, baseline: str) -> nn.Module:
        """Returns the attacker's proxy: trained on the clean set with that baseline's recipe and a separate seed."""
        ...

    def untrained_network(self) -> nn.Module:
        """Returns an untrained network with the victims' backbone."""
        ...

    def checkpointing(self, work: Resumable) -> AbstractContextManager[StepCallback]:
        """Makes long work resumable, see `advmoe.runtime.checkpoints.manager.checkpointing`."""
        ...


# attacks that need the data only, and attacks that also need a trained proxy
DATA_ONLY_ATTACKS: dict[type[Any], Callable[..., PoisonedSet]] = {
    RandomFlip: label_flip,
    PairFlip: label_flip,
    TargetedFlip: label_flip,
    BadNets: badnets,
    Blended: blended,
}
PROXY_ATTACKS: dict[type[Any], Callable[..., PoisonedSet]] = {
    LabelConsistent: label_consistent,
    ErrorMaximising: error_maximising,
}


def poison(
    clean: Split, stream: torch.Generator, settings: AnyPoisonAttack, rate: float, context: AttackContext
) -> PoisonedSet:
    """Poisons the clean training set; all random numbers come from `stream`.

    Raises UserError for settings that do not fit the data.
    """
    arguments, classes = (clean.images, clean.labels, stream, settings), context.classes
    match settings:
        case LabelConsistent() | ErrorMaximising():
            return PROXY_ATTACKS[type(settings)](
                *arguments, rate=rate, classes=classes, proxy=context.proxy(settings.proxy)
            )
        case WitchesBrew():
            return witches_brew(
                clean.images,
                clean.labels,
                stream,
                settings,
                rate=rate,
                classes=classes,
                proxy=context.proxy(settings.proxy),
                augmentation=context.augmentation,
                candidates=context.candidates,
            )
        case Unlearnable():
            network, checkpointing = context.untrained_network(), context.checkpointing
            return unlearnable(
                clean.images,
                clean.labels,
                stream,
                settings,
                rate=rate,
                network=network,
                checkpointing=checkpointing,
            )
        case _:
            return DATA_ONLY_ATTACKS[type(settings)](*arguments, rate=rate, classes=classes)


def trials_per_rate(settings: AnyPoisonAttack) -> int:
    """Returns the number of poisoned sets at one rate and seed: one for each target of witches' brew, else 1."""
    return settings.targets if isinstance(settings, WitchesBrew) else 1


def proxy_baselines(settings: AnyPoisonAttack) -> tuple[str, ...]:
    """Returns the baselines whose recipes the attacker trains proxies with."""
    return (settings.proxy,) if isinstance(settings, LabelConsistent | WitchesBrew | ErrorMaximising) else ()


def with_target(settings: AnyPoisonAttack, target: int) -> AnyPoisonAttack:
    """Returns the attack with another target class. Raises UserError for an attack without a target class."""
    if "target" not in type(settings).model_fields:
        raise UserError(f"--target: {settings.kind} has no target class")
    return validate(settings.model_dump() | {"target": target}, type(settings), "--target")

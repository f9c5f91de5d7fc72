"""All attacks by name. A new one is a file beside this, a name in the union and a case in `run`."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.fgsm import Fgsm, fgsm
from advmoe.attacks.model import Fooled, Model
from advmoe.attacks.pgd import Pgd, pgd

Attack = Annotated[Fgsm | Pgd, Field(discriminator="kind")]
NAMES = ("fgsm", "pgd")


def run(
    settings: Attack,
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    draws: Draws,
    fooled: Fooled | None = None,
) -> Tensor:
    """Run the attack that `settings` name; adversarial images (B, C, H, W)."""
    match settings:
        case Fgsm():
            return fgsm(model, images_BCHW, labels_B, ball=ball, settings=settings, draws=draws)
        case Pgd():
            return pgd(model, images_BCHW, labels_B, ball=ball, settings=settings, draws=draws, fooled=fooled)

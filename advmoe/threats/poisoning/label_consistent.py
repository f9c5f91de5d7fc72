"""Label-consistent backdoor: poisoned images keep their labels (Turner et al. 2019, arXiv 1912.02771).

Images of the target class are turned into adversarial examples of a proxy network and patched, so that the victim
learns the trigger instead of the image. In the paper the proxy is adversarially trained; it must not be the victim.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, round_to_uint8
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchStream
from advmoe.core.settings import NonNegativeInt, PositiveInt
from advmoe.threats.poisoning.perturbation import PerturbationSettings
from advmoe.threats.poisoning.poisoned_set import (
    Goal,
    PoisonedSet,
    poison_count,
    replace_rows,
    rows_of_class,
    sample_rows,
)
from advmoe.threats.poisoning.triggers import patch_trigger

BATCH_SIZE = 256  # images of a forward pass


class LabelConsistent(PerturbationSettings):
    """`size`: side length of the patch in pixels; `target`: the target class; `proxy`: the baseline with whose recipe,
    and a separate seed, the proxy is trained. Epsilon, steps and step size are those of PGD on the proxy. The rate is
    a share of the target class.
    """

    kind: Literal["label-consistent"]
    size: PositiveInt
    target: NonNegativeInt
    proxy: str


def label_consistent(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    settings: LabelConsistent,
    *,
    rate: float,
    classes: int,
    proxy: nn.Module,
) -> PoisonedSet:
    """Turns images of the target class into adversarial examples and patches them; labels are unchanged.

    Raises UserError when patch, target or rate do not fit the data.
    """
    trigger, rate_of = patch_trigger(settings.size, images_NCHW), f"class {settings.target}"
    class_rows = rows_of_class(labels_N, settings.target, classes)
    rows = sample_rows(class_rows, poison_count(rate, len(class_rows), rate_of), rate_of, stream)
    attack = Pgd(kind="pgd", steps=settings.steps, step_size=settings.step_size, restarts=1, loss="ce", targets=0)
    ball, draws, device = LInf(settings.epsilon), BatchStream(stream), next(proxy.parameters()).device
    adversarial = []
    with engine.attack_mode(proxy, "float32") as frozen_model:
        for batch in torch.split(rows, BATCH_SIZE):
            images, labels = images_NCHW[batch].to(device).float() / 255, labels_N[batch].to(device)
            points = pgd(frozen_model, images, labels, ball=ball, settings=attack, draws=draws)
            adversarial.append(round_to_uint8(points.cpu(), images_NCHW[batch], settings.epsilon))
    poisoned = replace_rows(
        images_NCHW,
        labels_N,
        rows,
        rate_of=rate_of,
        available=len(class_rows),
        new_images=trigger.stamp(torch.cat(adversarial)),
    )
    return replace(poisoned, goal=Goal(target=settings.target), trigger=trigger)

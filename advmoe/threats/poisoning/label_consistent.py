"""Label-consistent backdoor: every label stays true (Turner et al. 2019, arXiv 1912.02771).

Images of the target class are made hard for a network that the attacker has, so that the victim learns the trigger on
them instead. The paper takes an adversarially trained network for that; it must not be the victim itself.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, to_levels
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchDraws
from advmoe.core.settings import NonNegativeInt, PositiveInt
from advmoe.threats.poisoning.perturbation import Noise
from advmoe.threats.poisoning.poisoned_set import Goal, Poisoned, change, choose, count, members
from advmoe.threats.poisoning.triggers import patch

BATCH = 256  # images crafted at once


class LabelConsistent(Noise):
    """`proxy`: the baseline whose twin, trained under a seed of its own, the attacker has. The rate is a share of the
    target class; epsilon, steps and step size are those of PGD on the proxy.
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
) -> Poisoned:
    """Adversarial, then patched images of the target class, under their own label."""
    trigger, of = patch(settings.size, images_NCHW), f"class {settings.target}"
    found = members(labels_N, settings.target, classes)
    rows = choose(found, count(rate, len(found), of), of, stream)
    attack = Pgd(kind="pgd", steps=settings.steps, step_size=settings.step_size, restarts=1, loss="ce", targets=0)
    ball, draws, place = LInf(settings.epsilon), BatchDraws(stream), next(proxy.parameters()).device
    hard = []
    with engine.attack_mode(proxy, "float32") as cheap:
        for batch in torch.split(rows, BATCH):
            images, labels = images_NCHW[batch].to(place).float() / 255, labels_N[batch].to(place)
            points = pgd(cheap, images, labels, ball=ball, settings=attack, draws=draws)
            hard.append(to_levels(points.cpu(), images_NCHW[batch], settings.epsilon))
    poisoned = change(
        images_NCHW, labels_N, rows, of=of, available=len(found), new_images=trigger.stamp(torch.cat(hard))
    )
    return replace(poisoned, goal=Goal(target=settings.target), trigger=trigger)

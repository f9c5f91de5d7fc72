"""Witches' brew: poison whose training gradient imitates that of one mistake (Geiping et al. 2021, arXiv 2009.02276).

No trigger and true labels: a few images of the target class are changed so that a network which learns from them takes
one certain test image for that class. The noise maximises the cosine between the gradient that the mistake would give
and the gradient that the poison gives, both over all weights of a trained proxy (eq. 3 of the paper).

Shapes: M poisoned images, C channel, H/W pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.ball import to_levels
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.data.batches import Augmentation, augment
from advmoe.data.dataset import Split
from advmoe.models import inference
from advmoe.threats.poisoning.poisoned_set import Goal, Poisoned, change, choose, count

BATCH = 512  # poisoned images matched at once, as in the paper
DECAY_AT, DECAY = (3 / 8, 5 / 8, 7 / 8), 0.1  # of the steps, and the factor on the step size: the paper's schedule


class WitchesBrew(Settings):
    """`steps` of signed Adam, the first of `step_size` (relative to `epsilon`, L-inf), from each of `restarts` random
    starts; the best match is kept. `targets`: how many test images are tried, each with a poisoned set of its own, and
    victims of its own. `proxy`: a baseline's twin, trained under a seed of its own. The rate is a share of the set.
    """

    kind: Literal["witches-brew"]
    epsilon: Epsilon
    steps: PositiveInt
    step_size: PositiveFloat
    restarts: PositiveInt
    targets: PositiveInt
    proxy: str


def witches_brew(
    images_NCHW: Tensor,
    labels_N: Tensor,
    stream: torch.Generator,
    settings: WitchesBrew,
    *,
    rate: float,
    classes: int,
    proxy: nn.Module,
    augmentation: Augmentation,
    candidates: Split,
) -> Poisoned:
    """Poison for one of the `candidates`, drawn from those that the proxy gets right, towards another class drawn.

    `augmentation` is the victim's, through which the gradient is matched. Raises UserError when no candidate is right
    or the class holds fewer images than are to be poisoned.
    """
    wanted, true, target = _mistake(proxy, candidates, classes, stream)
    of = "the training set"
    found = (labels_N == target).nonzero().squeeze(1)
    rows = choose(found, count(rate, len(labels_N), of), f"class {target}", stream)
    images, labels = images_NCHW[rows].float() / 255, labels_N[rows]
    points = _best_match(proxy, images, labels, wanted, target, settings, augmentation, stream)
    new_images = to_levels(points, images_NCHW[rows], settings.epsilon)
    poisoned = change(images_NCHW, labels_N, rows, of=of, available=len(labels_N), new_images=new_images)
    return replace(poisoned, goal=Goal(target=target, source=true), wanted_image=wanted)


def _mistake(proxy: nn.Module, candidates: Split, classes: int, stream: torch.Generator) -> tuple[Tensor, int, int]:
    """An image (C, H, W), its class, and the class it shall be taken for."""
    place = next(proxy.parameters()).device
    predicted = inference.predict(proxy, candidates.pixels().to(place), BATCH).argmax(1).cpu()
    right = (predicted == candidates.labels).nonzero().squeeze(1)
    if not len(right):
        raise UserError("witches-brew: the proxy gets no test image right, so there is no mistake to cause")
    row = right[int(torch.randint(len(right), (), generator=stream))]
    true = int(candidates.labels[row])
    return candidates.images[row], true, (true + int(torch.randint(1, classes, (), generator=stream))) % classes


def _best_match(
    proxy: nn.Module,
    images: Tensor,
    labels: Tensor,
    wanted: Tensor,
    target: int,
    settings: WitchesBrew,
    augmentation: Augmentation,
    stream: torch.Generator,
) -> Tensor:
    place = next(proxy.parameters()).device
    images, labels = images.to(place), labels.to(place)
    weights = list(proxy.eval().parameters())
    mistake = torch.tensor([target], device=place)
    loss = functional.cross_entropy(proxy(wanted[None].to(place).float() / 255), mistake)
    goal = [gradient.detach() for gradient in torch.autograd.grad(loss, weights)]
    best, lowest = images, torch.inf
    for _ in range(settings.restarts):
        points, distance = _match(proxy, images, labels, goal, settings, augmentation, stream)
        if distance < lowest:
            best, lowest = points, distance
    return best.cpu()


def _match(
    proxy: nn.Module,
    images: Tensor,
    labels: Tensor,
    goal: Sequence[Tensor],
    settings: WitchesBrew,
    augmentation: Augmentation,
    stream: torch.Generator,
) -> tuple[Tensor, float]:
    """One descent from a random start; the points, and how far their gradient is from the goal at the last step."""
    epsilon = settings.epsilon
    noise = ((torch.rand(images.shape, generator=stream) * 2 - 1) * epsilon).to(images)
    noise = _cut(noise, images, epsilon).requires_grad_(True)
    optimizer = torch.optim.Adam([noise], lr=settings.step_size * epsilon)
    milestones = [round(share * settings.steps) for share in DECAY_AT]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, DECAY)
    distance = torch.inf
    for _ in range(settings.steps):
        distance, uphill = 0.0, torch.zeros_like(noise)
        for rows in torch.split(torch.arange(len(images), device=images.device), BATCH):
            points = augment(images[rows] + noise[rows], augmentation, stream)
            apart = _apart(proxy, points, labels[rows], goal)
            uphill += torch.autograd.grad(apart, noise)[0]  # not backward(), which would fill the proxy's gradients too
            distance += float(apart.detach()) * len(rows) / len(images)
        noise.grad = uphill.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            noise.copy_(_cut(noise, images, epsilon))
    return (images + noise).detach(), distance


def _cut(noise: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """Noise inside the ball that leaves the images inside [0, 1]."""
    return (images + noise.detach().clamp(-epsilon, epsilon)).clamp(0, 1) - images


def _apart(proxy: nn.Module, points: Tensor, labels: Tensor, goal: Sequence[Tensor]) -> Tensor:
    """1 minus the cosine between the gradient at the points and the goal, over all weights at once."""
    loss = functional.cross_entropy(proxy(points), labels)
    found = torch.autograd.grad(loss, list(proxy.parameters()), create_graph=True)
    product = torch.stack([(one * other).sum() for one, other in zip(found, goal, strict=True)]).sum()
    lengths = [torch.stack([part.square().sum() for part in parts]).sum().sqrt() for parts in (found, goal)]
    return 1 - product / (lengths[0] * lengths[1]).clamp_min(1e-12)

"""Witches' brew: targeted poisoning by gradient matching (Geiping et al. 2021, arXiv 2009.02276).

Without trigger or label changes, a few images of the target class are perturbed so that a network trained on them
classifies one chosen test image, the target image, as that class. The perturbation maximises the cosine between the
gradients of the loss on the poison and on the mislabelled target image, by all weights of a proxy (eq. 3 of the paper).

Shapes: M poisoned images, C channel, H/W pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.ball import round_to_uint8
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, PositiveFloat, PositiveInt, Settings
from advmoe.data.batches import Augmentation, augment
from advmoe.data.dataset import Split
from advmoe.models import inference
from advmoe.threats.poisoning.poisoned_set import Goal, PoisonedSet, poison_count, replace_rows, sample_rows

BATCH_SIZE = 512  # poisoned images per gradient, as in the paper
DECAY_AT, DECAY = (3 / 8, 5 / 8, 7 / 8), 0.1  # shares of the steps, factor on the step size: the paper's schedule


class WitchesBrew(Settings):
    """`steps` of signed Adam with initial `step_size` (relative to `epsilon`, L-inf), from each of `restarts` random
    starts, of which the best match is used. `targets`: number of target images, each with its own poisoned set and
    victims. `proxy`: the baseline with whose recipe, and a separate seed, the proxy is trained. The rate is a share of
    the set.
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
) -> PoisonedSet:
    """Poisons the set for a target image, drawn from the `candidates` that the proxy classifies correctly, and a random
    other class.

    Gradients are matched on images with the victims' `augmentation`. Raises UserError when no candidate is classified
    correctly, or when the class has fewer images than are to be poisoned.
    """
    target_image, source, target = _draw_target(proxy, candidates, classes, stream)
    rate_of = "the training set"
    class_rows = (labels_N == target).nonzero().squeeze(1)
    rows = sample_rows(class_rows, poison_count(rate, len(labels_N), rate_of), f"class {target}", stream)
    images, labels = images_NCHW[rows].float() / 255, labels_N[rows]
    points = _best_of_restarts(proxy, images, labels, target_image, target, settings, augmentation, stream)
    new_images = round_to_uint8(points, images_NCHW[rows], settings.epsilon)
    poisoned = replace_rows(
        images_NCHW, labels_N, rows, rate_of=rate_of, available=len(labels_N), new_images=new_images
    )
    return replace(poisoned, goal=Goal(target=target, source=source), target_image=target_image)


def _draw_target(proxy: nn.Module, candidates: Split, classes: int, stream: torch.Generator) -> tuple[Tensor, int, int]:
    """Draws a target image (C, H, W); returns it with its class and its target class."""
    device = next(proxy.parameters()).device
    predicted = inference.predict(proxy, candidates.pixels().to(device), BATCH_SIZE).argmax(1).cpu()
    correct_rows = (predicted == candidates.labels).nonzero().squeeze(1)
    if not len(correct_rows):
        raise UserError("witches-brew: the proxy classifies no test image correctly, so there is no target image")
    row = correct_rows[int(torch.randint(len(correct_rows), (), generator=stream))]
    source = int(candidates.labels[row])
    return candidates.images[row], source, (source + int(torch.randint(1, classes, (), generator=stream))) % classes


def _best_of_restarts(
    proxy: nn.Module,
    images: Tensor,
    labels: Tensor,
    target_image: Tensor,
    target: int,
    settings: WitchesBrew,
    augmentation: Augmentation,
    stream: torch.Generator,
) -> Tensor:
    device = next(proxy.parameters()).device
    images, labels = images.to(device), labels.to(device)
    weights = list(proxy.eval().parameters())
    target_label = torch.tensor([target], device=device)
    loss = functional.cross_entropy(proxy(target_image[None].to(device).float() / 255), target_label)
    goal = [gradient.detach() for gradient in torch.autograd.grad(loss, weights)]
    best, lowest = images, torch.inf
    for _ in range(settings.restarts):
        points, distance = _optimize_perturbation(proxy, images, labels, goal, settings, augmentation, stream)
        if distance < lowest:
            best, lowest = points, distance
    return best.cpu()


def _optimize_perturbation(
    proxy: nn.Module,
    images: Tensor,
    labels: Tensor,
    goal: Sequence[Tensor],
    settings: WitchesBrew,
    augmentation: Augmentation,
    stream: torch.Generator,
) -> tuple[Tensor, float]:
    """Optimises from one random start; returns the points, and the gradient distance at the last step."""
    epsilon = settings.epsilon
    noise = ((torch.rand(images.shape, generator=stream) * 2 - 1) * epsilon).to(images)
    noise = _project(noise, images, epsilon).requires_grad_(True)
    optimizer = torch.optim.Adam([noise], lr=settings.step_size * epsilon)
    milestones = [round(share * settings.steps) for share in DECAY_AT]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, DECAY)
    distance = torch.inf
    for _ in range(settings.steps):
        distance, gradient = 0.0, torch.zeros_like(noise)
        for rows in torch.split(torch.arange(len(images), device=images.device), BATCH_SIZE):
            points = augment(images[rows] + noise[rows], augmentation, stream)
            batch_distance = _gradient_distance(proxy, points, labels[rows], goal)
            # not backward(), which would also accumulate gradients of the proxy
            gradient += torch.autograd.grad(batch_distance, noise)[0]
            distance += float(batch_distance.detach()) * len(rows) / len(images)
        noise.grad = gradient.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            noise.copy_(_project(noise, images, epsilon))
    return (images + noise).detach(), distance


def _project(noise: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """Projects noise onto the ball and keeps the noisy images in [0, 1]."""
    return (images + noise.detach().clamp(-epsilon, epsilon)).clamp(0, 1) - images


def _gradient_distance(proxy: nn.Module, points: Tensor, labels: Tensor, goal: Sequence[Tensor]) -> Tensor:
    """Returns 1 minus the cosine between the loss gradient at the points and `goal`, over all weights at once."""
    loss = functional.cross_entropy(proxy(points), labels)
    gradient = torch.autograd.grad(loss, list(proxy.parameters()), create_graph=True)
    product = torch.stack([(one * other).sum() for one, other in zip(gradient, goal, strict=True)]).sum()
    norms = [torch.stack([part.square().sum() for part in parts]).sum().sqrt() for parts in (gradient, goal)]
    return 1 - product / (norms[0] * norms[1]).clamp_min(1e-12)

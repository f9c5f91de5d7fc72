"""PGD and AutoAttack of other libraries, called as in their documentation: model in eval mode, float32.

Shapes: N images, B batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import foolbox
import numpy as np
import pyautoattack
import torch
import torchattacks
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn


@dataclass(frozen=True)
class PgdConfig:
    """PGD from one random start: L-inf radius, number of steps, step size as a fraction of the radius, batch size."""

    epsilon: float
    steps: int
    step_size: float
    batch_size: int


Attack = Callable[[nn.Module, Tensor, Tensor, PgdConfig], Tensor]


def torchattacks_pgd(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, config: PgdConfig) -> Tensor:
    """Returns the adversarial images (N, C, H, W) of torchattacks."""
    attack = torchattacks.PGD(
        model, eps=config.epsilon, alpha=config.step_size * config.epsilon, steps=config.steps, random_start=True
    )
    return _in_batches(attack, images_NCHW, labels_N, config.batch_size)


def foolbox_pgd(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, config: PgdConfig) -> Tensor:
    """Returns the adversarial images (N, C, H, W) of foolbox."""
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images_NCHW.device)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=config.step_size, steps=config.steps, random_start=True)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        _, clipped, _ = attack(wrapped, images, labels, epsilons=config.epsilon)
        return clipped  # type: ignore[no-any-return]

    return _in_batches(run, images_NCHW, labels_N, config.batch_size)


def art_pgd(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, config: PgdConfig) -> Tensor:
    """Returns the adversarial images (N, C, H, W) of the adversarial-robustness-toolbox, which batches itself."""
    with torch.no_grad():
        classes = model(images_NCHW[:1]).shape[1]
    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images_NCHW.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images_NCHW.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=config.epsilon,
        eps_step=config.step_size * config.epsilon,
        max_iter=config.steps,
        num_random_init=1,
        batch_size=config.batch_size,
        verbose=False,
    )
    adversarial = attack.generate(images_NCHW.cpu().numpy(), labels_N.cpu().numpy())
    return torch.from_numpy(adversarial).to(images_NCHW.device)


PGD: dict[str, Attack] = {
    "torchattacks": torchattacks_pgd,
    "foolbox": foolbox_pgd,
    "adversarial-robustness-toolbox": art_pgd,
}


def reference_autoattack(
    model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, *, epsilon: float, batch_size: int, seed: int
) -> Tensor:
    """Returns the adversarial images (N, C, H, W) of the authors' standard AutoAttack; robust images are unchanged."""
    device = str(images_NCHW.device)
    attack = pyautoattack.AutoAttack(model, eps=epsilon, norm="Linf", version="standard", seed=seed, device=device)
    adversarial, _ = attack.run_standard_evaluation(images_NCHW, labels_N, batch_size=batch_size)
    return adversarial  # type: ignore[no-any-return]


def _in_batches(
    attack: Callable[[Tensor, Tensor], Tensor], images_NCHW: Tensor, labels_N: Tensor, batch_size: int
) -> Tensor:
    parts = zip(torch.split(images_NCHW, batch_size), torch.split(labels_N, batch_size), strict=True)
    return torch.cat([attack(images, labels).detach() for images, labels in parts])

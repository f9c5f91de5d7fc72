"""Where attacks run: the model made cheap to differentiate, in batches, and every success checked in float32.

Training and evaluation use this alike. A frozen eval-mode model needs no gradients for its weights, its BatchNorms fold
into the convolutions, and input gradients survive bfloat16; a *decision* does not, so an image counts as fooled only
where a float32 forward pass says so.

Shapes: B batch, N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import catalogue
from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.draws import ImageDraws
from advmoe.attacks.model import Model
from advmoe.models.layers import folded

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Run matrix work in `precision`; in float32 nothing is cast."""
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode without gradients for its parameters; both are put back as they were, layer by layer."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def crafting(model: nn.Module, precision: Precision) -> Iterator[Model]:
    """`model` in the form attacks want: frozen, folded, in `precision`; the logits come back as float32."""
    with frozen(model), folded(model, {DTYPES[precision], torch.float32}):

        def logits(images_BCHW: Tensor) -> Tensor:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
            with autocast(images_BCHW.device, precision):
                output: Tensor = model(images_BCHW)
            return output.float()

        yield logits


def craft(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    attack: catalogue.Attack,
    ball: Ball,
    draws: Draws,
    precision: Precision,
) -> Tensor:
    """Adversarial images for one training batch, every image attacked to the last step."""
    with crafting(model, precision) as cheap:
        return catalogue.run(attack, cheap, images_BCHW, labels_B, ball=ball, draws=draws)


def predict(model: nn.Module, images_NCHW: Tensor, batch_size: int) -> Tensor:
    """Logits (N, K) in float32 and eval mode.

    Every forward pass has exactly `batch_size` images, the last filled up with zeros: some kernels round differently
    for other sizes, and a decision should not depend on how many images came along.
    """
    if not len(images_NCHW):
        raise ValueError("no images to predict")
    with frozen(model), folded(model, {torch.float32}), torch.no_grad():
        return torch.cat([_padded(model, batch, batch_size) for batch in torch.split(images_NCHW, batch_size)])


def _padded(model: nn.Module, images_BCHW: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(images_BCHW)
    filled = functional.pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, missing))
    logits: Tensor = model(filled.contiguous(memory_format=torch.channels_last))[: len(images_BCHW)]
    return logits.float()


@dataclass(frozen=True)
class Attacked:
    """Adversarial images (N, C, H, W), and the model's float32 logits on the clean (N, K) and on those (N, K)."""

    images: Tensor
    clean_logits: Tensor
    logits: Tensor

    def correct(self, labels_N: Tensor) -> Tensor:
        """Which images are still classified correctly, (N,) bool: right when clean, and right under attack."""
        return (self.clean_logits.argmax(1) == labels_N) & (self.logits.argmax(1) == labels_N)


def attack(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    settings: catalogue.Attack,
    ball: Ball,
    *,
    seed: int,
    batch_size: int,
    precision: Precision,
) -> Iterator[Attacked]:
    """Attack the images batch by batch; yields one Attacked per batch so that the caller can show progress.

    An image that is wrong without any attack stays as it is. An image leaves the attack at its first point that a
    float32 forward pass gets wrong. Random draws are seeded by the image's position. What the attack returns is
    projected into the ball again before it is scored: its own claims count for nothing.
    """
    numbers = torch.arange(len(images_NCHW))
    for batch in torch.split(numbers, batch_size):
        images, labels = images_NCHW[batch], labels_N[batch]
        clean_logits = predict(model, images, batch_size)
        standing = clean_logits.argmax(1) == labels
        adversarial = images.clone()
        if standing.any():
            draws = ImageDraws(seed, settings.kind, batch[standing.cpu()])
            adversarial[standing] = _attack_standing(
                model, images[standing], labels[standing], settings, ball, draws, precision
            )
        yield Attacked(adversarial, clean_logits, predict(model, adversarial, batch_size))


def _attack_standing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: catalogue.Attack,
    ball: Ball,
    draws: Draws,
    precision: Precision,
) -> Tensor:
    def fooled(points: Tensor, labels_: Tensor) -> Tensor:
        if not len(points):
            return torch.zeros(0, dtype=torch.bool, device=points.device)
        return predict(model, points, len(points)).argmax(1) != labels_

    with crafting(model, precision) as cheap:
        found = catalogue.run(settings, cheap, images, labels, ball=ball, draws=draws, fooled=fooled)
    return ball.project(found.detach(), images)

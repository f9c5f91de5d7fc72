"""A step of joint adversarial training: by the project's trainer, and in plain PyTorch.

Both attack with ten steps of PGD from the same random starts through the whole mixture in eval mode, then take the same
step of SGD in train mode, so that the losses agree.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.data.batches import Augmentation
from advmoe.data.dataset import Dataset, Split
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import generator
from advmoe.training.batch_attacks import PgdBatches
from advmoe.training.config import Optimizer, Schedule, Validation
from advmoe.training.job import TrainingJob
from advmoe.training.joint import AlarmThresholds, JointConfig, MixtureTask
from advmoe.training.losses.dwf import Dwf
from advmoe.training.trainer import Trainer
from benchmarks import networks

NAME, SEED = "benchmark", 0
EPSILON, STEPS, STEP_SIZE, CLIP, LR = 0.03, 10, 0.25, 1.0, 0.01
ADVERSARY = PgdBatches(kind="pgd", steps=(STEPS,), step_size=STEP_SIZE)


def our_step(
    model: MixtureOfExperts, images_BCHW: Tensor, labels_B: Tensor, precision: Precision
) -> Callable[[], float]:
    """Returns a function that takes the next training step on this batch and returns the loss."""
    trainer = make_trainer(copy.deepcopy(model), images_BCHW, labels_B, precision)
    return lambda: float(trainer.step(images_BCHW, labels_B))


def make_trainer(
    model: MixtureOfExperts,
    images_BCHW: Tensor,
    labels_B: Tensor,
    precision: Precision,
    *,
    checkpointing: bool = False,
) -> Trainer:
    """Returns a new trainer of `model` whose training set is this batch."""
    recipe = _training_config(model, precision, len(labels_B)).model_copy(update={"checkpointing": checkpointing})
    return Trainer(MixtureTask(model, recipe), _training_job(recipe, images_BCHW, labels_B))


def plain_step(model: MixtureOfExperts, images_BCHW: Tensor, labels_B: Tensor) -> Callable[[], float]:
    """Returns the same as `our_step` in float32, the default memory format and plain PyTorch."""
    copied = networks.contiguous_copy(model)
    assert isinstance(copied, MixtureOfExperts)
    optimizer = MixtureTask(copied, _training_config(model, "float32", len(labels_B))).optimizer()
    noise = generator(SEED, NAME, "noise")

    def step() -> float:
        attacked = plain_pgd(copied.eval(), images_BCHW, labels_B, noise)
        copied.train()
        optimizer.zero_grad()
        loss = functional.nll_loss(copied(attacked), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(copied.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def plain_pgd(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, noise: torch.Generator) -> Tensor:
    """Returns the adversarial images (B, C, H, W) after all steps."""
    shift = EPSILON * (2 * torch.rand(images_BCHW.shape, generator=noise).to(images_BCHW.device) - 1)
    points = (images_BCHW + shift).clamp(0, 1)
    for _ in range(STEPS):
        points = points.detach().requires_grad_(True)
        loss = functional.cross_entropy(model(points), labels_B)
        (gradient,) = torch.autograd.grad(loss, points)
        moved = points.detach() + STEP_SIZE * EPSILON * gradient.sign()
        points = (images_BCHW + (moved - images_BCHW).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return points


def _training_job(recipe: JointConfig, images_BCHW: Tensor, labels_B: Tensor) -> TrainingJob:
    split = Split((images_BCHW * 255).round().to(torch.uint8), labels_B, torch.arange(len(labels_B)))
    return TrainingJob(
        name=NAME,
        seed=SEED,
        dataset=Dataset({"train": split}, networks.facts(images_BCHW), ""),
        config=recipe,
        adversary=ADVERSARY,
        epsilon=EPSILON,
        select_by="pgd",
    )


def _training_config(model: MixtureOfExperts, precision: Precision, batch_size: int) -> JointConfig:
    """Returns a config with constant learning rate, without augmentation and weight averaging, as in the plain loop."""
    return JointConfig(
        experts=tuple(f"expert-{number}" for number in range(len(model.experts))),
        gate=networks.GATE,
        mixing="probabilities",
        adversary=ADVERSARY,
        epochs=1000,
        batch_size=batch_size,
        micro_batch=None,
        optimizer=Optimizer(lr=LR, momentum=0.9, weight_decay=0.0005),
        gate_lr=LR,
        own_loss=0.0,
        recipe=Dwf(kind="dwf"),
        load_balance=0.0,
        checkpointing=False,
        schedule=Schedule(warmup=0.0, decay="constant"),
        clip=CLIP,
        ema=0.0,
        augmentation=Augmentation(crop=0, flip=False),
        precision=precision,
        awp=0.0,
        sync_batchnorm=False,
        selection="last",
        validation=Validation(steps=1, step_size=1.0, gap=0.2, images=1),
        alarms=AlarmThresholds(load=0.9, gradient=1e-6),
    )

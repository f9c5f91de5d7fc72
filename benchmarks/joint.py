"""A step of joint adversarial training, twice: by the project's loop, and as anybody would write it in plain PyTorch.

Both craft with ten steps of PGD from the same random starts through the whole mixture in eval mode, then take the same
step of SGD in train mode, so the losses must follow each other.

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
from advmoe.training.joint import Alarms, JointConfig, MixtureTask
from advmoe.training.losses.dwf import Dwf
from advmoe.training.trainer import Trainer, TrainingJob
from benchmarks import networks

NAME, SEED = "benchmark", 0
EPSILON, STEPS, STEP_SIZE, CLIP, LR = 0.03, 10, 0.25, 1.0, 0.01
ADVERSARY = PgdBatches(kind="pgd", steps=(STEPS,), step_size=STEP_SIZE)


def our_step(
    model: MixtureOfExperts, images_BCHW: Tensor, labels_B: Tensor, precision: Precision
) -> Callable[[], float]:
    """A function that takes one step on this batch, from where the last one ended, and returns the loss."""
    run = run_of(copy.deepcopy(model), images_BCHW, labels_B, precision)
    return lambda: float(run.step(images_BCHW, labels_B))


def run_of(
    model: MixtureOfExperts,
    images_BCHW: Tensor,
    labels_B: Tensor,
    precision: Precision,
    *,
    checkpointing: bool = False,
) -> Trainer:
    """The project's training loop around `model`, at its beginning; the batch is all that it has to learn from."""
    recipe = _recipe(model, precision, len(labels_B)).model_copy(update={"checkpointing": checkpointing})
    return Trainer(MixtureTask(model, recipe), _course(recipe, images_BCHW, labels_B))


def plain_step(model: MixtureOfExperts, images_BCHW: Tensor, labels_B: Tensor) -> Callable[[], float]:
    """The same in float32 and PyTorch's default memory format, with nothing of the project but the network."""
    own = networks.as_documented(model)
    assert isinstance(own, MixtureOfExperts)
    optimizer = MixtureTask(own, _recipe(model, "float32", len(labels_B))).optimizer()
    noise = generator(SEED, NAME, "noise")

    def step() -> float:
        attacked = plain_pgd(own.eval(), images_BCHW, labels_B, noise)
        own.train()
        optimizer.zero_grad()
        loss = functional.nll_loss(own(attacked), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(own.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def plain_pgd(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, noise: torch.Generator) -> Tensor:
    """Adversarial images (B, C, H, W) after all steps."""
    shift = EPSILON * (2 * torch.rand(images_BCHW.shape, generator=noise).to(images_BCHW.device) - 1)
    points = (images_BCHW + shift).clamp(0, 1)
    for _ in range(STEPS):
        points = points.detach().requires_grad_(True)
        loss = functional.cross_entropy(model(points), labels_B)
        (gradient,) = torch.autograd.grad(loss, points)
        moved = points.detach() + STEP_SIZE * EPSILON * gradient.sign()
        points = (images_BCHW + (moved - images_BCHW).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return points


def _course(recipe: JointConfig, images_BCHW: Tensor, labels_B: Tensor) -> TrainingJob:
    split = Split((images_BCHW * 255).round().to(torch.uint8), labels_B, torch.arange(len(labels_B)))
    return TrainingJob(
        name=NAME,
        seed=SEED,
        dataset=Dataset({"train": split}, networks.facts(images_BCHW), ""),
        recipe=recipe,
        adversary=ADVERSARY,
        epsilon=EPSILON,
        select_by="pgd",
    )


def _recipe(model: MixtureOfExperts, precision: Precision, batch_size: int) -> JointConfig:
    """Constant rate, no augmentation, no averaging: nothing that a plain loop would not have."""
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
        alarms=Alarms(load=0.9, gradient=1e-6),
    )

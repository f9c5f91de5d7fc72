"""A task of three classes of 8x8 grey images, and recipes of a moment: what several tests of training share.

Shapes: N images, C channel, H/W pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import RandomStream
from advmoe.attacks.engine import PassCount
from advmoe.data.batches import Augmentation
from advmoe.data.dataset import Dataset, DatasetInfo, Split
from advmoe.models.classifiers import GateSettings
from advmoe.training.batch_attacks import BatchAttack
from advmoe.training.config import Optimizer, Schedule, Validation
from advmoe.training.joint import AlarmThresholds

FACTS = DatasetInfo(channels=1, height=8, width=8, class_names=("a", "b", "c"), mean=(0.5,), std=(0.25,))
EPSILON = 0.05
CONSTANT = Schedule(warmup=0.0, decay="constant")  # a short run is then the beginning of a longer one
RECIPE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "micro_batch": None,
    "optimizer": Optimizer(lr=0.05, momentum=0.9, weight_decay=0.0005),
    "schedule": Schedule(warmup=0.2, decay="cosine"),
    "clip": 0.0,
    "ema": 0.0,
    "augmentation": Augmentation(crop=0, flip=False),
    "precision": "float32",
    "awp": 0.0,
    "sync_batchnorm": False,
    "selection": "last",
    "validation": Validation(steps=2, step_size=0.5, gap=0.2, images=18),
}
JOINT: dict[str, Any] = {  # what a mixture's recipe has beside; its adversary is each test's own
    "experts": ("left", "right"),
    "gate": GateSettings(width=2, temperature=1.0),
    "mixing": "probabilities",
    "gate_lr": 0.1,
    "own_loss": 0.0,
    "recipe": "dwf",
    "load_balance": 0.01,
    "checkpointing": False,
    "alarms": AlarmThresholds(load=0.9, gradient=1e-6),
}

Stream = Callable[..., torch.Generator]


def patterned(stream: Stream, count: int, name: str) -> Split:
    """Noisy copies of three fixed patterns, one a class: easily learned."""
    patterns_NCHW = torch.randint(40, 216, (3, 1, 8, 8), generator=stream("patterns"))
    noise_NCHW = torch.randint(-30, 31, (count, 1, 8, 8), generator=stream("noise", name))
    numbers = torch.arange(count)
    return Split((patterns_NCHW[numbers % 3] + noise_NCHW).to(torch.uint8), numbers % 3, numbers)


def patterned_set(stream: Stream, train: int = 48, validation: int = 18) -> Dataset:
    """Both splits that training reads."""
    return Dataset(
        {"train": patterned(stream, train, "train"), "validation": patterned(stream, validation, "validation")},
        FACTS,
        "0" * 64,
    )


def craft(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    attack: BatchAttack,
    draws: RandomStream,
    passes: PassCount | None = None,
) -> Tensor:
    """A batch (B, C, H, W) under a drawn attack, as training runs it, in float32."""
    return engine.attack_batch(
        model,
        images_BCHW,
        labels_B,
        attack.function,
        ball=attack.ball,
        draws=draws,
        precision="float32",
        passes=passes,
    )

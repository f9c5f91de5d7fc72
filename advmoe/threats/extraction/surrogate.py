"""Training of surrogates: from scratch on a transfer set, once per budget, by one recipe for all attacks.

The weights of the last epoch are returned, since an attacker has no test set for model selection.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from advmoe.core.errors import UserError
from advmoe.data.batches import batches_per_epoch
from advmoe.data.dataset import Dataset, Split
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.machine import derive_seed, device
from advmoe.threats.extraction.config import Common
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.training.batch_attacks import CleanBatches
from advmoe.training.config import TrainingConfig
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.single import PlainTask
from advmoe.training.trainer import fit


def build(backbone: BackboneSettings, data: Dataset, *seed: object) -> nn.Module:
    """Builds an untrained network. It normalises with the constants of the victim's data."""
    return classifiers.build(PlainArchitecture(kind="plain", backbone=backbone), data.facts, *seed).to(device())


def extend_epochs(config: TrainingConfig, images: int, steps: int) -> TrainingConfig:
    """Returns the settings with at least as many epochs as give `steps` optimiser steps."""
    epochs = -(-steps // batches_per_epoch(images, config.batch_size))
    return config.model_copy(update={"epochs": max(config.epochs, epochs)})


def train(
    name: str,
    backbone: BackboneSettings,
    transfer_set: TransferSet,
    data: Dataset,
    common: Common,
    *,
    seed: int,
    epsilon: float,
    checkpoint_dir: Path | None = None,
) -> TrainingResult:
    """Trains a network from scratch on a transfer set, with cross-entropy against soft (or one-hot) labels.

    The initial weights depend on `name` and `seed` alone, so runs on different transfer sets can be compared. Of `data`
    only the facts are used; `checkpoint_dir`: for resumable checkpoints. Raises UserError for fewer than two images,
    which BatchNorm cannot train on.
    """
    if len(transfer_set.images) < 2:
        raise UserError("a surrogate needs at least two images; prepare.splits.pool or the budget is too small")
    config = extend_epochs(common.recipe, len(transfer_set.images), common.steps)
    split = Split(transfer_set.images, transfer_set.answers, transfer_set.queries)
    job = TrainingJob(
        name=name,
        seed=derive_seed(seed, name),
        dataset=replace(data, splits={"train": split}),
        config=config,
        adversary=CleanBatches(kind="clean"),
        epsilon=epsilon,
        select_by="loss",
        checkpoint_dir=checkpoint_dir,
    )
    return fit(PlainTask(build(backbone, data, seed, name), config), job)

"""Surrogates: networks trained from scratch on a transfer set, at every budget anew, by one recipe for all attacks.

The last epoch is kept: an attacker has no test set to select by.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from advmoe.core.errors import UserError
from advmoe.data.batches import batches_per_epoch
from advmoe.data.dataset import Dataset, Split
from advmoe.models import classifiers
from advmoe.models.classifiers import Backbone, Plain
from advmoe.runtime.machine import derive_seed, device
from advmoe.threats.extraction.config import Common
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.training.batch_attacks import CleanBatches
from advmoe.training.config import TrainingConfig
from advmoe.training.single import PlainLearner
from advmoe.training.trainer import TrainingJob, TrainingResult, fit


def fresh(backbone: Backbone, data: Dataset, *seed: object) -> nn.Module:
    """An untrained network. Normalisation is that of the victim's data: constants, which give nothing away."""
    return classifiers.build(Plain(kind="plain", backbone=backbone), data.facts, *seed).to(device())


def long_enough(recipe: TrainingConfig, images: int, steps: int) -> TrainingConfig:
    """The recipe for as many epochs as make `steps`, if that is more."""
    epochs = -(-steps // batches_per_epoch(images, recipe.batch_size))
    return recipe.model_copy(update={"epochs": max(recipe.epochs, epochs)})


def train(
    name: str,
    backbone: Backbone,
    found: TransferSet,
    data: Dataset,
    common: Common,
    *,
    seed: int,
    epsilon: float,
    shelf: Path | None = None,
) -> TrainingResult:
    """A fresh network that learns the answers: cross-entropy with soft labels, of classes where only those were told.

    `name` and `seed` alone say where it starts: what two transfer sets make of it can be compared. `data` lends its
    facts only; `shelf`: where to keep what is unfinished. Raises UserError when there is just one image, which
    BatchNorm cannot learn from.
    """
    if len(found.images) < 2:
        raise UserError("a surrogate needs two images at least; prepare.splits.pool or the budget is too small")
    recipe = long_enough(common.recipe, len(found.images), common.steps)
    split = Split(found.images, found.answers, found.queries)
    course = TrainingJob(
        name=name,
        seed=derive_seed(seed, name),
        dataset=replace(data, splits={"train": split}),
        recipe=recipe,
        adversary=CleanBatches(kind="clean"),
        epsilon=epsilon,
        select_by="loss",
        shelf=shelf,
    )
    return fit(PlainLearner(fresh(backbone, data, seed, name), recipe), course)

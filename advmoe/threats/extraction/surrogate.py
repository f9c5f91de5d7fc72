"""Surrogates: networks trained from scratch on a transfer set, at every budget anew, by one recipe for all attacks.

The last epoch is kept: an attacker has no test set to select by.
"""

from dataclasses import replace

from torch import nn

from advmoe import classifiers
from advmoe.classifiers import Backbone, Plain
from advmoe.data.dataset import Dataset, Split
from advmoe.machine import derive_seed, device
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.training.adversary import CleanBatches
from advmoe.training.loop import Course, Trained, fit
from advmoe.training.recipe import Learning
from advmoe.training.single import PlainLearner


def fresh(backbone: Backbone, data: Dataset, *seed: object) -> nn.Module:
    """An untrained network. Normalisation is that of the victim's data: constants, which give nothing away."""
    return classifiers.build(Plain(kind="plain", backbone=backbone), data.facts, *seed).to(device())


def train(
    name: str, backbone: Backbone, found: TransferSet, data: Dataset, recipe: Learning, *, seed: int, epsilon: float
) -> Trained:
    """A fresh network that learns the answers: cross-entropy with soft labels, of classes where only those were told.

    `data` lends its facts only. A transfer set needs at least two images.
    """
    split = Split(found.images, found.answers, found.queries)
    course = Course(
        name=name,
        seed=derive_seed(seed, name),
        dataset=replace(data, splits={"train": split}),
        recipe=recipe,
        adversary=CleanBatches(kind="clean"),
        epsilon=epsilon,
        select_by="loss",
    )
    return fit(PlainLearner(fresh(backbone, data, seed, name), recipe), course)

"""Activation clustering (Chen et al. 2018, arXiv 1811.03728): features of a poisoned class form two clusters."""

from typing import Literal

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from advmoe.core.settings import Fraction01, PositiveInt, Settings
from advmoe.threats.poisoning.detectors.inputs import DetectorInputs, features

RESTARTS = 10  # of 2-means; the best result is used


class Clustering(Settings):
    """`dimensions`: of the reduced features; the smaller of two clusters is flagged if its share is below `below`."""

    kind: Literal["clustering"]
    dimensions: PositiveInt
    below: Fraction01


def clustering(inputs: DetectorInputs, settings: Clustering) -> Tensor:
    """Flags (N,) the smaller cluster of each class. Features are reduced by PCA; the paper uses ICA."""
    features_NF, labels_N = features(inputs.victim, inputs.train.pixels()), inputs.train.labels
    seed = int(torch.randint(2**31, (), generator=inputs.stream))
    flagged_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in sorted(set(labels_N.tolist())):
        rows = (labels_N == label).nonzero().squeeze(1)
        if len(rows) > 1:
            smaller = smaller_cluster(features_NF[rows], settings.dimensions, seed)
            if float(smaller.float().mean()) < settings.below:
                flagged_N[rows[smaller]] = True
    return flagged_N


def smaller_cluster(features_NF: Tensor, dimensions: int, seed: int) -> Tensor:
    """Returns which points (N,) are in the smaller of two clusters."""
    dimensions = min(dimensions, *features_NF.shape)
    reduced = PCA(dimensions, random_state=seed).fit_transform(features_NF.double().numpy())
    cluster = torch.from_numpy(KMeans(2, n_init=RESTARTS, random_state=seed).fit_predict(reduced))
    smaller: Tensor = cluster == int(cluster.float().mean() < 0.5)
    return smaller

"""PRADA, a detector of extraction: distances between benign queries are normally distributed, those between an
attack's queries are not (Juuti et al. 2019, arXiv 1805.02628, algorithm 3).

Shapes: N images, P pixels.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from scipy.stats import shapiro
from torch import Tensor

from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings

OUTLIER_DEVIATIONS = 3.0  # standard deviations beyond which distances are left out, as in the paper
MAX_SHAPIRO_VALUES = 5000  # the Shapiro-Wilk test is calibrated for at most this many; the paper tests all


class Prada(Settings):
    """Settings. The detector raises the alarm when the Shapiro-Wilk statistic of at least `least` distances, outliers
    removed, is below `delta`; it tests after every `every` queries.
    """

    delta: Annotated[float, Field(gt=0, lt=1)]
    least: Annotated[int, Field(ge=3)]
    every: PositiveInt


def queries_until_alarm(images_NCHW: Tensor, classes_N: Tensor, settings: Prada) -> int | None:
    """Returns the number of queries at which the alarm is raised, None if it is never raised.

    `images_NCHW`: queries in order; `classes_N`: answered classes. The tested distances are those from each query to
    the nearest image in the growing set of its class. An image is added to the set if its distance is above a
    threshold: the mean minus the standard deviation of the distances of added images, which never decreases.
    """
    pixels_NP = images_NCHW.flatten(1).float() / PIXEL_LEVELS
    sets: dict[int, _GrowingSet] = {}
    distances: list[float] = []
    for number, label in enumerate(classes_N.tolist(), start=1):
        distance = sets.setdefault(label, _GrowingSet()).distance(pixels_NP[number - 1])
        if distance is not None:
            distances.append(distance)
        if number % settings.every == 0 and _is_suspicious(distances, settings):
            return number
    return None


class _GrowingSet:
    """The growing set of one class: its images, their distances when added, and the threshold for adding an image."""

    def __init__(self) -> None:
        self.members: list[Tensor] = []
        self.distances = [0.0]
        self.threshold = 0.0

    def distance(self, image_P: Tensor) -> float | None:
        """Returns the distance to the nearest member, None for the first image; adds the image if it is far enough."""
        if not self.members:
            self.members.append(image_P)
            return None
        distance = float((torch.stack(self.members) - image_P).norm(dim=1).min())
        if distance > self.threshold:
            self.members.append(image_P)
            self.distances.append(distance)
            spread = torch.tensor(self.distances)
            self.threshold = max(self.threshold, float(spread.mean() - spread.std(correction=0)))
        return distance


def _is_suspicious(distances: Sequence[float], settings: Prada) -> bool:
    if len(distances) < settings.least:
        return False
    inliers = remove_outliers(distances)
    return len(inliers) >= settings.least and shapiro_wilk_statistic(inliers) < settings.delta


def remove_outliers(distances: Sequence[float]) -> Tensor:
    """Returns the last `MAX_SHAPIRO_VALUES` distances without outliers."""
    values = torch.tensor(distances[-MAX_SHAPIRO_VALUES:], dtype=torch.float64)
    return values[(values - values.mean()).abs() <= OUTLIER_DEVIATIONS * values.std(correction=0)]


def shapiro_wilk_statistic(values: Tensor) -> float:
    """Returns the Shapiro-Wilk statistic in [0, 1], near 1 for a normal distribution; 0 if all values are equal."""
    if float(values.max() - values.min()) == 0:
        return 0.0
    return float(shapiro(values.numpy()).statistic)

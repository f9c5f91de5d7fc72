"""PRADA: the queries of an honest user lie at normally distributed distances, those of a thief do not (Juuti et al.
2019, arXiv 1805.02628, algorithm 3).

Shapes: N images, P pixels.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from scipy.stats import shapiro
from torch import Tensor

from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings

OUTLIERS = 3.0  # standard deviations beyond which distances are left out, as in the paper
MOST = 5000  # the Shapiro-Wilk test is calibrated up to so many values; the paper looks at all


class Prada(Settings):
    """`delta`: the alarm is raised when the Shapiro-Wilk statistic of the distances falls below it, and there are
    `least` of them without outliers; it is looked at after every `every` queries.
    """

    delta: Annotated[float, Field(gt=0, lt=1)]
    least: Annotated[int, Field(ge=3)]
    every: PositiveInt


def alarm_after(images_NCHW: Tensor, classes_N: Tensor, settings: Prada) -> int | None:
    """How many queries, in the order asked, pass before the alarm; None if it is never raised.

    Of every query the distance to the nearest one of the same answered class in a growing set counts; the set takes an
    image in only if that distance is above a threshold, the mean less the standard deviation of those that made it
    grow, which never falls.
    """
    pixels_NP = images_NCHW.flatten(1).float() / PIXEL_LEVELS
    sets: dict[int, _Growing] = {}
    distances: list[float] = []
    for number, label in enumerate(classes_N.tolist(), start=1):
        distance = sets.setdefault(label, _Growing()).distance(pixels_NP[number - 1])
        if distance is not None:
            distances.append(distance)
        if number % settings.every == 0 and _suspicious(distances, settings):
            return number
    return None


class _Growing:
    """The growing set of one class: its images, at which distances they came, and the distance that makes it grow."""

    def __init__(self) -> None:
        self.members: list[Tensor] = []
        self.distances = [0.0]
        self.threshold = 0.0

    def distance(self, image_P: Tensor) -> float | None:
        """To the nearest member, None for the first image, which becomes one."""
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


def _suspicious(distances: Sequence[float], settings: Prada) -> bool:
    if len(distances) < settings.least:
        return False
    inliers = without_outliers(distances)
    return len(inliers) >= settings.least and normality(inliers) < settings.delta


def without_outliers(distances: Sequence[float]) -> Tensor:
    """The latest distances but those far from their mean."""
    values = torch.tensor(distances[-MOST:], dtype=torch.float64)
    return values[(values - values.mean()).abs() <= OUTLIERS * values.std(correction=0)]


def normality(values: Tensor) -> float:
    """The Shapiro-Wilk statistic, 1 for a normal distribution; 0 where all values are equal."""
    if float(values.max() - values.min()) == 0:
        return 0.0
    return float(shapiro(values.numpy()).statistic)

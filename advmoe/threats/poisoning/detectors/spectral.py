"""Spectral signatures (Tran et al. 2018, arXiv 1811.00636): poison shifts features of its class in one direction."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from advmoe.core.settings import PositiveFloat, Settings
from advmoe.threats.poisoning.detectors.inputs import DetectorInputs, features


class Spectral(Settings):
    """`expected`: the expected share of poison in a class; `excess` times that share of every class is removed."""

    kind: Literal["spectral"]
    expected: Annotated[float, Field(gt=0, lt=1)]
    excess: PositiveFloat

    @model_validator(mode="after")
    def _check_share(self) -> "Spectral":
        if self.expected * self.excess >= 1:
            raise ValueError(
                f"removes a whole class: {self.excess:g} times an expected share of {self.expected:g} is all of it"
            )
        return self


def spectral(inputs: DetectorInputs, settings: Spectral) -> Tensor:
    """Flags (N,) in every class the images with the largest `outlier_scores` of their features."""
    features_NF, labels_N = features(inputs.victim, inputs.train.pixels()), inputs.train.labels
    flagged_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in sorted(set(labels_N.tolist())):
        rows = (labels_N == label).nonzero().squeeze(1)
        scores = outlier_scores(features_NF[rows])
        worst = scores.argsort(descending=True)[: round(settings.excess * settings.expected * len(rows))]
        flagged_N[rows[worst]] = True
    return flagged_N


def outlier_scores(features_NF: Tensor) -> Tensor:
    """Returns squared projections (N,) of the centred features on their first right singular vector."""
    centred_NF = features_NF.double() - features_NF.double().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred_NF, full_matrices=False)
    scores: Tensor = (centred_NF @ directions[0]).square()
    return scores

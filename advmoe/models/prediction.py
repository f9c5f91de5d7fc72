"""`advmoe predict`: what a classifier says about image files, and, for a mixture, who said it.

Shapes: N images, E experts, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advmoe.core.errors import UserError
from advmoe.data.images import as_nchw
from advmoe.data.sources.folder import read_image
from advmoe.models import inference
from advmoe.models.classifiers import Classifier, Mixture
from advmoe.models.mixture import MixtureOfExperts, expert_weights
from advmoe.runtime.machine import device


@dataclass(frozen=True)
class ExpertPrediction:
    """One expert's say: its weight in the mixture, the class it picks, and how sure it is."""

    expert: str
    weight: float
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The class of one image, its probability, and the votes behind it (none for a plain network)."""

    path: Path
    label: str
    probability: float
    votes: tuple[ExpertPrediction, ...]


def predict(classifier: Classifier, files: Sequence[Path]) -> list[Prediction]:
    """Classify image files, resized to what the model was trained on. Raises UserError for a file that is no image."""
    images = _read(classifier, files).to(device())
    model = classifier.model.to(device())
    probability, label = torch.softmax(inference.predict(model, images, len(files)), dim=1).max(dim=1)
    if not probability.isfinite().all():
        raise UserError(f"{files[int(probability.isfinite().int().argmin())]}: the model gives no finite answer")
    votes = _votes(classifier, images)
    names = classifier.about.facts.class_names
    found = zip(files, label.tolist(), probability.tolist(), votes, strict=True)
    return [Prediction(path, names[index], share, vote) for path, index, share, vote in found]


def _read(classifier: Classifier, files: Sequence[Path]) -> Tensor:
    facts = classifier.about.facts
    images = [read_image(path, facts.channels, (facts.width, facts.height)) for path in files]
    return torch.from_numpy(as_nchw(np.stack(images))).float() / 255


def _votes(classifier: Classifier, images_NCHW: Tensor) -> list[tuple[ExpertPrediction, ...]]:
    model, architecture = classifier.model, classifier.about.architecture
    if not isinstance(model, MixtureOfExperts) or not isinstance(architecture, Mixture):
        return [() for _ in images_NCHW]
    with inference.eval_mode(model), torch.no_grad():
        parts = model.parts(images_NCHW)
    probability_NE, label_NE = torch.softmax(parts.logits_BEK, dim=2).max(dim=2)
    names = classifier.about.facts.class_names
    return [
        tuple(
            ExpertPrediction(expert, weight, names[label], share)
            for expert, weight, label, share in zip(
                architecture.experts, counts.tolist(), labels.tolist(), shares.tolist(), strict=True
            )
        )
        for counts, labels, shares in zip(
            expert_weights(parts.log_gate_BE, model.mixing), label_NE, probability_NE, strict=True
        )
    ]

"""Classifies image files (`advmoe predict`); for a mixture also returns each expert's prediction and weight.

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
from advmoe.models.classifiers import Classifier, MixtureArchitecture
from advmoe.models.mixture import MixtureOfExperts, expert_weights
from advmoe.runtime.machine import device


@dataclass(frozen=True)
class ExpertPrediction:
    """One expert's prediction: its weight in the mixture, the predicted class and the probability of that class."""

    expert: str
    weight: float
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The predicted class of one image, its probability, and the experts' predictions (empty for a single network)."""

    path: Path
    label: str
    probability: float
    expert_predictions: tuple[ExpertPrediction, ...]


def predict(classifier: Classifier, files: Sequence[Path]) -> list[Prediction]:
    """Classifies image files, resized to the size of the training images.

    Raises UserError if a file is not a readable image or the model's output is not finite.
    """
    images = _read_images(classifier, files).to(device())
    model = classifier.model.to(device())
    probability, label = torch.softmax(inference.predict(model, images, len(files)), dim=1).max(dim=1)
    if not probability.isfinite().all():
        raise UserError(f"{files[int(probability.isfinite().int().argmin())]}: the model's output is not finite")
    expert_predictions = _expert_predictions(classifier, images)
    names = classifier.about.facts.class_names
    rows = zip(files, label.tolist(), probability.tolist(), expert_predictions, strict=True)
    return [Prediction(path, names[index], probability, experts) for path, index, probability, experts in rows]


def _read_images(classifier: Classifier, files: Sequence[Path]) -> Tensor:
    facts = classifier.about.facts
    images = [read_image(path, facts.channels, (facts.width, facts.height)) for path in files]
    return torch.from_numpy(as_nchw(np.stack(images))).float() / 255


def _expert_predictions(classifier: Classifier, images_NCHW: Tensor) -> list[tuple[ExpertPrediction, ...]]:
    model, architecture = classifier.model, classifier.about.architecture
    if not isinstance(model, MixtureOfExperts) or not isinstance(architecture, MixtureArchitecture):
        return [() for _ in images_NCHW]
    with inference.eval_mode(model), torch.no_grad():
        parts = model.forward_parts(images_NCHW)
    probability_NE, label_NE = torch.softmax(parts.logits_BEK, dim=2).max(dim=2)
    names = classifier.about.facts.class_names
    return [
        tuple(
            ExpertPrediction(expert, weight, names[label], probability)
            for expert, weight, label, probability in zip(
                architecture.experts, weights.tolist(), labels.tolist(), probabilities.tolist(), strict=True
            )
        )
        for weights, labels, probabilities in zip(
            expert_weights(parts.log_gate_BE, model.mixing), label_NE, probability_NE, strict=True
        )
    ]

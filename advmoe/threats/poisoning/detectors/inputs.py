"""Inputs of detectors: the poisoned set, a network trained on it, clean images; and the network's features.

Shapes: N images, C channel, H/W pixels, F features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advmoe.data.dataset import Split
from advmoe.models import inference
from advmoe.models.cnn import SmallCnn
from advmoe.models.mixture import MixtureOfExperts
from advmoe.models.resnet import ResNet18
from advmoe.models.resnet50 import ResNet50
from advmoe.models.wideresnet import WideResNet28

BATCH_SIZE = 200  # images of a forward pass


@dataclass(frozen=True)
class DetectorInputs:
    """`victim` was trained on `train`; `clean`: held-out images; `stream`: generator of a detector's random numbers."""

    victim: nn.Module
    train: Split
    clean: Split
    stream: torch.Generator


def features(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Returns the inputs of the last layer (N, F) on the CPU; for a mixture those of all experts, concatenated."""
    return apply_in_batches(model, images_NCHW, lambda batch: _features(model, batch))


def _features(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    if isinstance(model, MixtureOfExperts):
        return torch.cat([_features(expert, images_BCHW) for expert in model.experts], dim=1)
    assert isinstance(model, ResNet18 | ResNet50 | WideResNet28 | SmallCnn)
    return model.features(images_BCHW)


def apply_in_batches(model: nn.Module, images_NCHW: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `function(batch)` for all images, concatenated, as float32 on the CPU; the model is in eval mode."""
    device = next(model.parameters()).device
    with inference.eval_mode(model), torch.no_grad():
        return torch.cat([function(batch.to(device)).float().cpu() for batch in torch.split(images_NCHW, BATCH_SIZE)])

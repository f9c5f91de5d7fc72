"""What a defender has: the poisoned set, a network trained on it, and some images known to be clean.

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

BATCH = 200  # images of a forward pass


@dataclass(frozen=True)
class Evidence:
    """`victim` was trained on `train`; `clean` images were held out; `stream` is for whatever a detector draws."""

    victim: nn.Module
    train: Split
    clean: Split
    stream: torch.Generator


def features(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """What the last layer reads (N, F), of a mixture those of all experts side by side; on the CPU."""
    return read_all(model, images_NCHW, lambda batch: _features(model, batch))


def _features(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    if isinstance(model, MixtureOfExperts):
        return torch.cat([_features(expert, images_BCHW) for expert in model.experts], dim=1)
    assert isinstance(model, ResNet18 | ResNet50 | WideResNet28 | SmallCnn)
    return model.features(images_BCHW)


def read_all(model: nn.Module, images_NCHW: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    place = next(model.parameters()).device
    with inference.eval_mode(model), torch.no_grad():
        return torch.cat([read(batch.to(place)).float().cpu() for batch in torch.split(images_NCHW, BATCH)])

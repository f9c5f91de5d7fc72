"""Evaluation-mode forward passes: precision, batching and folding, without gradients for the weights.

Shapes: B batch, N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.grouped_experts import group_experts
from advmoe.models.layers import fold_batchnorm

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def autocast(device: torch.device, precision: Precision, *, cache: bool = True) -> Iterator[None]:
    """Runs products and convolutions in `precision`; float32 disables autocast. `cache`: cache cast weights."""
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32", cache_enabled=cache):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Sets eval mode and disables gradients of the parameters; on exit restores both, layer by layer."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def predict(model: nn.Module, images_NCHW: Tensor, batch_size: int) -> Tensor:
    """Returns the logits (N, K), computed in float32 and eval mode.

    Every forward pass has exactly `batch_size` images; the last batch is padded with zeros. Some kernels round
    differently at other batch sizes, and predictions should not depend on the number of images.

    Raises ValueError if there are no images.
    """
    if not len(images_NCHW):
        raise ValueError("no images to predict")
    with eval_mode(model), fold_batchnorm(model), group_experts(model), torch.no_grad():
        return torch.cat([_padded(model, batch, batch_size) for batch in torch.split(images_NCHW, batch_size)])


def _padded(model: nn.Module, images_BCHW: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(images_BCHW)
    filled = functional.pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, missing))
    logits: Tensor = model(filled.contiguous(memory_format=torch.channels_last))[: len(images_BCHW)]
    return logits.float()

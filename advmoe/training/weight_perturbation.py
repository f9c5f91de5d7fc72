"""Adversarial weight perturbation: gradients at adversarially perturbed weights (Wu et al. 2020, arXiv 2004.05884).

The weights are perturbed for one gradient as images are for one step. That flattens the loss around the weights and
reduces the robust generalisation gap.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from advmoe.attacks.ball import TINY


@contextmanager
def perturbed_weights(model: nn.Module, gamma: float) -> Iterator[None]:
    """Inside, each layer's weights W are W + gamma * |W| * G / |G|, one ascent step along their gradient G (the paper's
    gamma is 0.005). Biases, BatchNorm's two vectors and weights without a gradient are not perturbed.

    Afterwards weights and BatchNorm statistics are restored exactly: the statistics are those of the unperturbed
    weights. Gradients are left to the caller.
    """
    weights = [weight for weight in model.parameters() if weight.ndim > 1 and weight.grad is not None]
    tensors = [*weights, *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None
            weight.add_(gamma * weight.norm() / weight.grad.norm().clamp_min(TINY) * weight.grad)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)

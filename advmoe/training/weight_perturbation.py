"""Adversarial weight perturbation: learn at the worst weights nearby (Wu et al. 2020, arXiv 2004.05884).

Images are attacked so that hard ones are learned from; here the weights are, too, for the length of one gradient. What
is learned there holds in a neighbourhood, and robustness in testing falls less short of that in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from advmoe.attacks.ball import TINY


@contextmanager
def perturbed_weights(model: nn.Module, gamma: float) -> Iterator[None]:
    """Inside, each layer's weights W stand at W + gamma * |W| * G / |G|: one step uphill along the gradient G that they
    have, as long as their own norm allows (the paper's gamma is 0.005). Biases and BatchNorm's two vectors stay, as do
    weights without a gradient.

    Afterwards weights and BatchNorm statistics are as they were, to the bit: the statistics are those of the weights
    that will be used. Gradients are the caller's.
    """
    weights = [weight for weight in model.parameters() if weight.ndim > 1 and weight.grad is not None]
    moving = [*weights, *model.buffers()]
    before = [tensor.detach().clone() for tensor in moving]
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None
            weight.add_(gamma * weight.norm() / weight.grad.norm().clamp_min(TINY) * weight.grad)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(moving, before, strict=True):
                tensor.copy_(old)

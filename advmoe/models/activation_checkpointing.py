"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): activations are recomputed in the backward pass.

Saves memory at the cost of one more forward pass per module; only one module at a time holds its activations.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_checkpointed(module: nn.Module, function: Callable[[Tensor], Tensor], images_BCHW: Tensor) -> Tensor:
    """Returns `function(images_BCHW)` without storing activations; the backward pass runs `function` again.

    `module` is the network that `function` calls. Values, gradients and running statistics equal those of a direct
    call. `module` must not draw random numbers.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _temporary_buffers(module)

    result: Tensor = checkpoint(
        function, images_BCHW, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


@contextmanager
def _temporary_buffers(module: nn.Module) -> Iterator[None]:
    """Replaces the buffers of `module` by copies: the recomputation must not update BatchNorm statistics again."""
    originals = [(layer, dict(layer.named_buffers(recurse=False))) for layer in module.modules()]
    for layer, buffers in originals:
        for name, buffer in buffers.items():
            setattr(layer, name, buffer.clone())
    try:
        yield
    finally:
        for layer, buffers in originals:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)

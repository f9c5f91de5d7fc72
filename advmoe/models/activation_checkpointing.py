"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): forget what the backward pass needs, compute it again.

Memory for time: one more forward pass of each part, and of all parts only one at a time has its activations in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(part: nn.Module, function: Callable[[Tensor], Tensor], images_BCHW: Tensor) -> Tensor:
    """`function(images_BCHW)`, run once more in the backward pass; `part` is the network that it runs through.

    Values, gradients and running statistics are those of a plain call. The part must draw no random numbers.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _on_copies(part)

    result: Tensor = checkpoint(
        function, images_BCHW, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


@contextmanager
def _on_copies(part: nn.Module) -> Iterator[None]:
    """Inside, `part` works on copies of its buffers: BatchNorm must not learn from the same batch twice."""
    kept = [(layer, dict(layer.named_buffers(recurse=False))) for layer in part.modules()]
    for layer, buffers in kept:
        for name, buffer in buffers.items():
            setattr(layer, name, buffer.clone())
    try:
        yield
    finally:
        for layer, buffers in kept:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)

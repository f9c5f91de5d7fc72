"""The oracle contract: whatever is attacked stands behind it, and every image costs one query.

The victim answers in eval mode, without gradients, with a softmax at temperature 1; the attacker sees what the answer
mode leaves of that. A budget is a wall, not a counter: what would exceed it raises before the victim is asked.

Shapes: N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import StringConstraints
from torch import Tensor
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.data.dataset import digests

# soft: all probabilities; rounded-k: the same to k decimals, a defence; top1: the class and nothing else
Answers = Annotated[str, StringConstraints(pattern=r"^(soft|top1|rounded-[1-9])$")]
# uint8 images (N, C, H, W) -> probabilities (N, K)
Ask = Callable[[Tensor], Tensor]


@dataclass
class Oracle:
    """A victim with a budget. `used` counts images; `asked` holds their digests in order: the query log."""

    ask_victim: Ask
    mode: str
    budget: int
    used: int = 0
    asked: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Queries that may still be asked."""
        return self.budget - self.used

    def ask(self, images_NCHW: Tensor) -> Tensor:
        """The answers (N, K) to uint8 images, as the mode leaves them: one-hot for classes.

        Raises UserError when the budget does not cover all of them; none is asked then.
        """
        if len(images_NCHW) > self.left:
            raise UserError(
                f"the budget of {self.budget} queries does not cover {len(images_NCHW)} more: {self.left} are left"
            )
        told = self.ask_victim(images_NCHW)
        self.recall(images_NCHW)
        return told_as(told, self.mode)

    def recall(self, images_NCHW: Tensor) -> None:
        """Count images that were asked, be it before a kill: those cost their queries too."""
        self.used += len(images_NCHW)
        self.asked += digests(images_NCHW)


def told_as(probabilities_NK: Tensor, mode: str) -> Tensor:
    """What an answer mode leaves of probabilities, (N, K)."""
    if mode == "soft":
        return probabilities_NK
    if mode == "top1":
        return functional.one_hot(probabilities_NK.argmax(1), probabilities_NK.shape[1]).float()
    return torch.round(probabilities_NK, decimals=int(mode.removeprefix("rounded-")))

"""The oracle: black-box access to a victim with a query budget; every image is one query.

The victim answers in eval mode, without gradients, with a softmax at temperature 1; the attacker receives the answers
in the format of the answer mode. The attack never sends more queries than the budget: a batch that exceeds it raises
before the victim is queried.

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
from advmoe.data.dataset import image_digests

# soft: all probabilities; rounded-k: probabilities to k decimals, a defence; top1: the class only, one-hot
AnswerMode = Annotated[str, StringConstraints(pattern=r"^(soft|top1|rounded-[1-9])$")]
# uint8 images (N, C, H, W) -> probabilities (N, K)
QueryFn = Callable[[Tensor], Tensor]


@dataclass
class Oracle:
    """A victim with a query budget. `used`: number of images sent; `query_log`: their digests in order."""

    query_victim: QueryFn
    mode: str
    budget: int
    used: int = 0
    query_log: list[str] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Number of queries left in the budget."""
        return self.budget - self.used

    def query(self, images_NCHW: Tensor) -> Tensor:
        """Returns the answers (N, K) to uint8 images (N, C, H, W), in the format of the answer mode.

        Raises UserError when the budget does not cover all images; none is sent then.
        """
        if len(images_NCHW) > self.remaining:
            raise UserError(
                f"the budget of {self.budget} queries does not cover {len(images_NCHW)} more: {self.remaining} are left"
            )
        probabilities = self.query_victim(images_NCHW)
        self.record_queries(images_NCHW)
        return format_answers(probabilities, self.mode)

    def record_queries(self, images_NCHW: Tensor) -> None:
        """Counts and logs images as queries, also those that were sent before an interruption."""
        self.used += len(images_NCHW)
        self.query_log += image_digests(images_NCHW)


def format_answers(probabilities_NK: Tensor, mode: str) -> Tensor:
    """Returns probabilities (N, K) in the format of an answer mode (N, K)."""
    if mode == "soft":
        return probabilities_NK
    if mode == "top1":
        return functional.one_hot(probabilities_NK.argmax(1), probabilities_NK.shape[1]).float()
    return torch.round(probabilities_NK, decimals=int(mode.removeprefix("rounded-")))

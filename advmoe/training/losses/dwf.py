"""The paper's own defence: cross-entropy of the mixture's answer (arXiv 2512.20821)."""

from typing import Literal

from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import Settings
from advmoe.training.losses.batch import Batch


class Dwf(Settings):
    """It has no numbers of its own."""

    kind: Literal["dwf"]

    def loss(self, batch: Batch) -> Tensor:
        """A mean over the batch; the answer is a log-probability already."""
        return functional.nll_loss(batch.attacked.log_probs_BK, batch.labels_B)

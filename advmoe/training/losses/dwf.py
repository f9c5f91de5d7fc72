"""The paper's defence: cross-entropy of the mixture's output (arXiv 2512.20821)."""

from typing import Literal

from torch import Tensor
from torch.nn import functional

from advmoe.core.settings import Settings
from advmoe.training.losses.batch import Batch


class Dwf(Settings):
    """The loss has no parameters."""

    kind: Literal["dwf"]

    def loss(self, batch: Batch) -> Tensor:
        """Returns the loss, a mean over the batch; the mixture's outputs are log-probabilities."""
        return functional.nll_loss(batch.attacked.log_probs_BK, batch.labels_B)

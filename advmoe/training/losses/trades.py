"""TRADES on the mixture's answer (Zhang et al., ICML 2019; see `advmoe.training.trades`).

It is chosen by `train.adversary`, since its attack belongs to it: there is no `train.recipe` of this name.
"""

from dataclasses import dataclass

from torch import Tensor

from advmoe.training.losses.batch import Batch
from advmoe.training.trades import trades_loss


@dataclass(frozen=True)
class Trades:
    """`beta` weighs the divergence."""

    beta: float

    def loss(self, batch: Batch) -> Tensor:
        """The clean answer's cross-entropy, and how far the attack moves the answer."""
        return trades_loss(batch.clean().log_probs_BK, batch.attacked.log_probs_BK, batch.labels_B, self.beta)

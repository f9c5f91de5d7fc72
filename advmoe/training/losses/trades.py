"""TRADES on the mixture's output (Zhang et al., ICML 2019; see `advmoe.training.trades`).

`train.adversary: trades` selects it, together with its attack: there is no `train.recipe` of this name.
"""

from dataclasses import dataclass

from torch import Tensor

from advmoe.training.losses.batch import Batch
from advmoe.training.trades import trades_loss


@dataclass(frozen=True)
class TradesLoss:
    """`beta`: weight of the divergence."""

    beta: float

    def loss(self, batch: Batch) -> Tensor:
        """Returns the cross-entropy on clean images plus the divergence of the output on attacked ones."""
        return trades_loss(batch.clean().log_probs_BK, batch.attacked.log_probs_BK, batch.labels_B, self.beta)

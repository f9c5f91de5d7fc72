"""The input of the losses: a batch with the mixture's output.

Shapes: B batch, C channel, H/W pixels.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from advmoe.models.mixture import MixtureOfExperts, MixtureOutput, mix


@dataclass(frozen=True)
class Batch:
    """The mixture, its output on the attacked images, the labels, and the clean images, which some losses need."""

    mixture: MixtureOfExperts
    attacked: MixtureOutput
    labels_B: Tensor
    clean_BCHW: Tensor

    def clean(self) -> MixtureOutput:
        """Returns the mixture's output on the clean images, by one more forward pass at each call."""
        return self.mixture.forward_parts(self.clean_BCHW)

    def routing_loss(self) -> Tensor:
        """Returns the cross-entropy of the mixture's output on the attacked images with detached experts: it trains the
        gate only. For losses of the experts' outputs, from which the gate would learn nothing about labels.
        """
        output = self.attacked
        log_probs_BK = mix(output.log_gate_BE, output.logits_BEK.detach(), self.mixture.mixing)
        return functional.nll_loss(log_probs_BK, self.labels_B)

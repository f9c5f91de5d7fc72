"""A batch as an objective meets it.

Shapes: B batch, C channel, H/W pixels.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from advmoe.models.mixture import MixtureOfExperts, MixtureOutput, mix


@dataclass(frozen=True)
class Batch:
    """Labels, what the mixture said of the attacked images, and the clean ones, of which some objectives ask, too."""

    mixture: MixtureOfExperts
    attacked: MixtureOutput
    labels_B: Tensor
    clean_BCHW: Tensor

    def clean(self) -> MixtureOutput:
        """What the mixture says of the clean images: one more forward pass, at each call."""
        return self.mixture.parts(self.clean_BCHW)

    def routing_loss(self) -> Tensor:
        """Cross-entropy of the answer to the attacked images with the experts held still: the gate alone learns from
        it. For objectives that ask the experts and not the answer, from which a gate would learn nothing of labels.
        """
        said = self.attacked
        answer_BK = mix(said.log_gate_BE, said.logits_BEK.detach(), self.mixture.mixing)
        return functional.nll_loss(answer_BK, self.labels_B)

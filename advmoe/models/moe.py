"""The mixture: every expert votes, the gate weighs the votes (arXiv 2512.20821: soft gate, flat topology).

Shapes: B batch, C channel, H/W pixels, E experts, K classes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Mixing = Literal["probabilities", "logits"]


class Parts(NamedTuple):
    """A forward pass taken apart: mixed log-probabilities (B, K), log gate weights (B, E), expert logits (B, E, K)."""

    log_probs_BK: Tensor
    log_gate_BE: Tensor
    logits_BEK: Tensor


def mix(log_gate_BE: Tensor, logits_BEK: Tensor, mixing: Mixing) -> Tensor:
    """Mixed log-probabilities (B, K).

    probabilities: log p(y|x) = logsumexp_e(log g_e(x) + log p_e(y|x)), in log space so that nothing underflows;
    logits: log_softmax(sum_e g_e(x) z_e(x)), a different model.
    """
    if mixing == "probabilities":
        return torch.logsumexp(log_gate_BE.unsqueeze(2) + functional.log_softmax(logits_BEK, dim=2), dim=1)
    return functional.log_softmax((log_gate_BE.exp().unsqueeze(2) * logits_BEK).sum(dim=1), dim=1)


class MixtureOfExperts(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> log-probabilities (B, K).

    A log-probability is a valid logit: log_softmax leaves it unchanged, so cross-entropy may be put on top as on any
    classifier. Never put a softmax in between.
    """

    def __init__(self, experts: Sequence[nn.Module], gate: nn.Module, mixing: Mixing) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.mixing: Mixing = mixing

    def parts(self, images_BCHW: Tensor) -> Parts:
        """The forward pass with its intermediate results."""
        logits_BEK = torch.stack([expert(images_BCHW) for expert in self.experts], dim=1)
        log_gate_BE = self.gate(images_BCHW)
        return Parts(mix(log_gate_BE, logits_BEK, self.mixing), log_gate_BE, logits_BEK)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.parts(images_BCHW).log_probs_BK


class UniformGate(nn.Module):
    """Weighs all experts alike: turns a mixture into the plain ensemble it must beat."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, images_BCHW: Tensor) -> Tensor:
        log_share = -torch.log(torch.tensor(float(self.experts)))
        return log_share.to(images_BCHW.device).expand(len(images_BCHW), self.experts)

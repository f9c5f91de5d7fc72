"""The mixture of experts: a gate-weighted combination of all experts' outputs (arXiv 2512.20821: soft gate, flat).

Shapes: B batch, C channel, H/W pixels, E experts, K classes, F features.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.activation_checkpointing import run_checkpointed
from advmoe.models.layers import linear_in_float32

Mixing = Literal["probabilities", "logits", "top1"]


class MixtureOutput(NamedTuple):
    """Outputs of a forward pass: mixed log-probabilities (B, K), log gate weights (B, E), expert logits (B, E, K)."""

    log_probs_BK: Tensor
    log_gate_BE: Tensor
    logits_BEK: Tensor


class GroupedForward(Protocol):
    """A joint forward pass of all experts."""

    def is_faster(self, images_BCHW: Tensor, /) -> bool:
        """Returns whether this is faster than running the experts in turn."""
        ...

    def __call__(self, images_BCHW: Tensor, /) -> Tensor:
        """Returns the experts' logits (B, E, K)."""
        ...


def mix(log_gate_BE: Tensor, logits_BEK: Tensor, mixing: Mixing) -> Tensor:
    """Returns the mixed log-probabilities (B, K).

    probabilities: log p(y|x) = logsumexp_e(log g_e(x) + log p_e(y|x)), in log space to avoid underflow;
    logits: log_softmax(sum_e g_e(x) z_e(x)), a different model;
    top1: log p_e*(y|x) of the one expert e* = argmax_e g_e(x). Straight-through gradient (Bengio et al. 2013): the
    backward pass uses the soft weights, otherwise attacks would have no gradient of the routing.
    """
    if mixing == "probabilities":
        return torch.logsumexp(log_gate_BE.unsqueeze(2) + functional.log_softmax(logits_BEK, dim=2), dim=1)
    if mixing == "top1":
        return (expert_weights(log_gate_BE, mixing).unsqueeze(2) * functional.log_softmax(logits_BEK, dim=2)).sum(dim=1)
    return functional.log_softmax((expert_weights(log_gate_BE, mixing).unsqueeze(2) * logits_BEK).sum(dim=1), dim=1)


def expert_weights(log_gate_BE: Tensor, mixing: Mixing) -> Tensor:
    """Returns the weight of each expert (B, E): the gate weights; for `top1` 1 for the expert with the largest weight
    and 0 for the others, with the gradient of the gate weights.
    """
    soft_BE = log_gate_BE.exp()
    if mixing != "top1":
        return soft_BE
    hard_BE = functional.one_hot(soft_BE.argmax(dim=1), soft_BE.shape[1]).to(soft_BE)
    return hard_BE + (soft_BE - soft_BE.detach())  # the term in brackets is exactly 0


class MixtureOfExperts(nn.Module):
    """Pixels in [0, 1], (B, C, H, W) -> log-probabilities (B, K).

    Log-probabilities are valid logits: log_softmax leaves them unchanged, so cross-entropy applies as to any
    classifier. Do not apply a softmax in between.
    """

    def __init__(self, experts: Sequence[nn.Module], gate: nn.Module, mixing: Mixing) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.mixing: Mixing = mixing
        self.grouped_experts: GroupedForward | None = None  # set inside `group_experts`
        self.checkpointing = False  # in train mode: activation checkpointing of each expert

    def forward_parts(self, images_BCHW: Tensor) -> MixtureOutput:
        """Returns the output of the forward pass with its intermediate results."""
        logits_BEK = self.expert_logits(images_BCHW)
        log_gate_BE = self.log_gate(images_BCHW)
        return MixtureOutput(mix(log_gate_BE, logits_BEK, self.mixing), log_gate_BE, logits_BEK)

    def expert_logits(self, images_BCHW: Tensor) -> Tensor:
        """Returns the experts' logits (B, E, K), by grouped convolutions inside `group_experts` where faster."""
        if self.grouped_experts is not None and self.grouped_experts.is_faster(images_BCHW):
            return self.grouped_experts(images_BCHW)
        return torch.stack([self._run(expert, expert, images_BCHW) for expert in self.experts], dim=1)

    def log_gate(self, images_BCHW: Tensor) -> Tensor:
        """Log gate weights (B, E) alone."""
        log_gate_BE: Tensor = self.gate(images_BCHW)
        return log_gate_BE

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_parts(images_BCHW).log_probs_BK

    def _run(self, expert: nn.Module, function: Callable[[Tensor], Tensor], images_BCHW: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return run_checkpointed(expert, function, images_BCHW)
        return function(images_BCHW)


class UniformGate(nn.Module):
    """A gate with equal weights for all experts: turns a mixture into an averaging ensemble."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, images_BCHW: Tensor) -> Tensor:
        log_share = -float(
            torch.tensor(float(self.experts)).log()
        )  # a Python float of float32 precision: no copy to the device
        return torch.full((images_BCHW.shape[0], self.experts), log_share, device=images_BCHW.device)


def _zero_initialised(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _apply_per_expert(layers: Sequence[nn.Module], features_BEF: Tensor) -> list[Tensor]:
    """Applies each expert's layer to that expert's features, in float32."""
    outputs = []
    for layer, features_BF in zip(layers, features_BEF.unbind(dim=1), strict=True):
        assert isinstance(layer, nn.Linear)
        outputs.append(linear_in_float32(layer, features_BF))
    return outputs


class ConfidenceHeads(nn.Module):
    """One linear head per expert that predicts from its features whether the expert is correct.

    Features (B, E, F) -> log weights (B, E): log_softmax(confidence / temperature), confidences as logits. The heads
    are initialised to zero: equal confidences.
    """

    def __init__(self, *, experts: int, features: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.heads = nn.ModuleList([_zero_initialised(nn.Linear(features, 1)) for _ in range(experts)])

    def confidence(self, features_BEF: Tensor) -> Tensor:
        """Returns the confidences as logits (B, E)."""
        return torch.cat(_apply_per_expert(list(self.heads), features_BEF), dim=1)

    def forward(self, features_BEF: Tensor) -> Tensor:
        return functional.log_softmax(self.confidence(features_BEF) / self.temperature, dim=1)


class ConfidentExperts(MixtureOfExperts):
    """A mixture weighted by the experts' own confidences instead of a gate (Cui et al. 2022, Synergy-of-Experts).

    The experts must be backbones with a method `features` and a last layer `classify`.
    """

    gate: ConfidenceHeads

    def forward_parts(self, images_BCHW: Tensor) -> MixtureOutput:
        """Returns the output of the forward pass with its intermediate results."""
        features_BEF = self.features(images_BCHW)
        logits_BEK = self.classify_features(features_BEF)
        log_gate_BE = self.gate(features_BEF)
        return MixtureOutput(mix(log_gate_BE, logits_BEK, self.mixing), log_gate_BE, logits_BEK)

    def log_gate(self, images_BCHW: Tensor) -> Tensor:
        """Returns the log weights (B, E)."""
        log_gate_BE: Tensor = self.gate(self.features(images_BCHW))
        return log_gate_BE

    def classify_features(self, features_BEF: Tensor) -> Tensor:
        """Returns the experts' logits (B, E, K) for their features (B, E, F)."""
        layers = [expert.get_submodule("classify") for expert in self.experts]
        return torch.stack(_apply_per_expert(layers, features_BEF), dim=1)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Returns the experts' pooled features (B, E, F)."""
        features = [self._run(expert, expert.features, images_BCHW) for expert in self.experts]  # type: ignore[arg-type]
        return torch.stack(features, dim=1)

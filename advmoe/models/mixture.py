"""The mixture: every expert votes, the gate weighs the votes (arXiv 2512.20821: soft gate, flat topology).

Shapes: B batch, C channel, H/W pixels, E experts, K classes, F features.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.activation_checkpointing import checkpointed
from advmoe.models.layers import linear_in_float32

Mixing = Literal["probabilities", "logits", "top1"]


class MixtureOutput(NamedTuple):
    """A forward pass taken apart: mixed log-probabilities (B, K), log gate weights (B, E), expert logits (B, E, K)."""

    log_probs_BK: Tensor
    log_gate_BE: Tensor
    logits_BEK: Tensor


class GroupedForward(Protocol):
    """All experts at once."""

    def pays(self, images_BCHW: Tensor, /) -> bool:
        """Whether it is faster than one after another."""
        ...

    def __call__(self, images_BCHW: Tensor, /) -> Tensor:
        """Their logits (B, E, K)."""
        ...


def mix(log_gate_BE: Tensor, logits_BEK: Tensor, mixing: Mixing) -> Tensor:
    """Mixed log-probabilities (B, K).

    probabilities: log p(y|x) = logsumexp_e(log g_e(x) + log p_e(y|x)), in log space so that nothing underflows;
    logits: log_softmax(sum_e g_e(x) z_e(x)), a different model;
    top1: log p_e*(y|x) of the one expert e* = argmax_e g_e(x). Its gradient goes straight through the choice (Bengio et
    al. 2013): backwards the weights are the soft ones, or an attack would see no routing at all.
    """
    if mixing == "probabilities":
        return torch.logsumexp(log_gate_BE.unsqueeze(2) + functional.log_softmax(logits_BEK, dim=2), dim=1)
    if mixing == "top1":
        return (expert_weights(log_gate_BE, mixing).unsqueeze(2) * functional.log_softmax(logits_BEK, dim=2)).sum(dim=1)
    return functional.log_softmax((expert_weights(log_gate_BE, mixing).unsqueeze(2) * logits_BEK).sum(dim=1), dim=1)


def expert_weights(log_gate_BE: Tensor, mixing: Mixing) -> Tensor:
    """What each expert's vote counts (B, E): the gate's weights; under top1 1 for the expert with the most, 0 for the
    others, with the gradient of the weights.
    """
    soft_BE = log_gate_BE.exp()
    if mixing != "top1":
        return soft_BE
    hard_BE = functional.one_hot(soft_BE.argmax(dim=1), soft_BE.shape[1]).to(soft_BE)
    return hard_BE + (soft_BE - soft_BE.detach())  # the bracket is exactly 0


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
        self.together: GroupedForward | None = None  # set by `side_by_side`, for a while
        self.checkpointing = False  # in train mode: one expert's activations at a time, for one more forward pass

    def parts(self, images_BCHW: Tensor) -> MixtureOutput:
        """The forward pass with its intermediate results."""
        logits_BEK = self.logits(images_BCHW)
        log_gate_BE = self.log_gate(images_BCHW)
        return MixtureOutput(mix(log_gate_BE, logits_BEK, self.mixing), log_gate_BE, logits_BEK)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """The experts' logits (B, E, K), all at once where something has been set up for that and pays."""
        if self.together is not None and self.together.pays(images_BCHW):
            return self.together(images_BCHW)
        return torch.stack([self._run(expert, expert, images_BCHW) for expert in self.experts], dim=1)

    def log_gate(self, images_BCHW: Tensor) -> Tensor:
        """Log gate weights (B, E) alone."""
        log_gate_BE: Tensor = self.gate(images_BCHW)
        return log_gate_BE

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.parts(images_BCHW).log_probs_BK

    def _run(self, expert: nn.Module, function: Callable[[Tensor], Tensor], images_BCHW: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpointed(expert, function, images_BCHW)
        return function(images_BCHW)


class UniformGate(nn.Module):
    """Weighs all experts alike: turns a mixture into the plain ensemble it must beat."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, images_BCHW: Tensor) -> Tensor:
        log_share = -float(torch.tensor(float(self.experts)).log())  # a float32: no copy to wait for
        return torch.full((images_BCHW.shape[0], self.experts), log_share, device=images_BCHW.device)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _each(layers: Sequence[nn.Module], features_BEF: Tensor) -> list[Tensor]:
    """Each expert's layer on that expert's features."""
    found = []
    for layer, features_BF in zip(layers, features_BEF.unbind(dim=1), strict=True):
        assert isinstance(layer, nn.Linear)
        found.append(linear_in_float32(layer, features_BF))
    return found


class ConfidenceHeads(nn.Module):
    """One number for each expert, from that expert's own features: how sure it is that its answer is right.

    Features (B, E, F) -> log weights (B, E): log_softmax(confidence / temperature), confidences as logits. The heads
    start at zero: at first all experts are equally sure.
    """

    def __init__(self, *, experts: int, features: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.heads = nn.ModuleList([_zero(nn.Linear(features, 1)) for _ in range(experts)])

    def confidence(self, features_BEF: Tensor) -> Tensor:
        """Confidences as logits (B, E)."""
        return torch.cat(_each(list(self.heads), features_BEF), dim=1)

    def forward(self, features_BEF: Tensor) -> Tensor:
        return functional.log_softmax(self.confidence(features_BEF) / self.temperature, dim=1)


class ConfidentExperts(MixtureOfExperts):
    """Experts that say how sure they are; there is no gate beside them (Cui et al. 2022, Synergy-of-Experts).

    The experts are backbones with `features` and a last layer `classify`.
    """

    gate: ConfidenceHeads

    def parts(self, images_BCHW: Tensor) -> MixtureOutput:
        """The forward pass with its intermediate results."""
        features_BEF = self.features(images_BCHW)
        logits_BEK = self.votes(features_BEF)
        log_gate_BE = self.gate(features_BEF)
        return MixtureOutput(mix(log_gate_BE, logits_BEK, self.mixing), log_gate_BE, logits_BEK)

    def log_gate(self, images_BCHW: Tensor) -> Tensor:
        """Log weights (B, E) alone."""
        log_gate_BE: Tensor = self.gate(self.features(images_BCHW))
        return log_gate_BE

    def votes(self, features_BEF: Tensor) -> Tensor:
        """The experts' logits (B, E, K)."""
        layers = [expert.get_submodule("classify") for expert in self.experts]
        return torch.stack(_each(layers, features_BEF), dim=1)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The experts' pooled features (B, E, F)."""
        each = [self._run(expert, expert.features, images_BCHW) for expert in self.experts]  # type: ignore[arg-type]
        return torch.stack(each, dim=1)

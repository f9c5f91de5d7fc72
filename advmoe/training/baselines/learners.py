"""Mixtures of others under our protocol: the same pre-trained experts, attacks, epochs, optimiser and selection.

What differs is what their papers are about: what weighs the experts, and what learns.

Shapes: B batch, C channel, H/W pixels, E experts, N = B * E, K classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.models.mixture import ConfidentExperts, MixtureOfExperts
from advmoe.training.config import sgd
from advmoe.training.joint import JointConfig, MixtureTask
from advmoe.training.losses.expert_losses import log_prob_of_class, per_expert_batch


class LastLayersTask(MixtureTask):
    """MoRE (Cheng et al. 2021, arXiv 2104.10586): the experts are frozen, BatchNorm statistics included; the gate and
    the experts' last layers are trained, adversarially.
    """

    def __init__(self, model: MixtureOfExperts, recipe: JointConfig) -> None:
        super().__init__(model, recipe)
        self.heads = nn.ModuleList([expert.get_submodule("classify") for expert in model.experts])
        model.experts.requires_grad_(False)
        self.heads.requires_grad_(True)

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD over last layers and gate."""
        pairs = [(self.heads, self.recipe.optimizer.lr), (self.mixture.gate, self.recipe.gate_lr)]
        return sgd(pairs, self.recipe.optimizer)

    def begin(self) -> None:
        """The gate is in train mode, the experts are as pre-training left them."""
        super().begin()
        self.mixture.experts.eval()


class AlternatingTask(MixtureTask):
    """After AdvMoE (Zhang et al., ICCV 2023): hard routing, router and experts updated in turn, each adversarially and
    each while the other holds still.

    AdvMoE routes inside the network, layer by layer, to pathways of one backbone. Here whole networks are chosen, which
    is another and coarser model; the alternation and the hard choice are what is compared. Each turn is one batch, so
    that as many batches are learned from as by the others.
    """

    def __init__(self, model: MixtureOfExperts, recipe: JointConfig) -> None:
        super().__init__(model, recipe)
        self.turn = 0

    def begin(self) -> None:
        """Hand the turn over."""
        super().begin()
        routing = self.turn % 2 == 0
        self.turn += 1
        self.mixture.gate.requires_grad_(routing)
        self.mixture.experts.requires_grad_(not routing)
        if routing:
            self.mixture.experts.eval()
        else:
            self.mixture.gate.eval()

    def state(self) -> dict[str, Tensor]:
        """Whose turn it is, too."""
        return {**super().state(), "turn": torch.tensor(self.turn)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with that turn."""
        norms = dict(state)
        turn = norms.pop("turn", torch.zeros(()))
        if turn.dtype != torch.int64 or turn.ndim:
            raise UserError("does not hold whose turn it is")
        super().restore(norms)
        self.turn = int(turn)


class SynergyTask(MixtureTask):
    """Synergy-of-Experts (Cui et al., NeurIPS 2022): who is best at an image learns it, and each says how sure it is.

    Per image the experts' cross-entropies are joined by a smooth minimum, -log mean_e exp(-CE_e), so that the gradient
    goes to the experts that are nearly right; each confidence learns the probability that its expert gives to the true
    class, by binary cross-entropy. The paper attacks every sub-model by itself; under the common protocol the batch is
    attacked through the whole, straight through the choice. Its loss is its own: of `adversary: trades` it has the
    images only, and of `own_loss`, `load_balance` and `recipe` nothing.
    """

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Smooth minimum of the experts' losses plus the loss of their confidences, means over the batch."""
        del clean_BCHW
        assert isinstance(self.mixture, ConfidentExperts)
        features_BEF = self.mixture.features(images_BCHW)
        votes_NK, labels_N = per_expert_batch(self.mixture.votes(features_BEF), labels_B)
        right_BE = log_prob_of_class(votes_NK, labels_N).view(features_BEF.shape[:2])
        return (smooth_minimum(-right_BE) + self._unsure(features_BEF, right_BE)).mean()

    def _unsure(self, features_BEF: Tensor, right_BE: Tensor) -> Tensor:
        assert isinstance(self.mixture, ConfidentExperts)
        confidence_BE = self.mixture.gate.confidence(features_BEF)
        told_BE = right_BE.detach().exp()
        return functional.binary_cross_entropy_with_logits(confidence_BE, told_BE, reduction="none").mean(dim=1)


def smooth_minimum(losses_BE: Tensor) -> Tensor:
    """-log mean_e exp(-loss_e) (B,): the loss itself where all are alike, else between the least and the mean."""
    return -torch.logsumexp(-losses_BE, dim=1) + torch.log(torch.tensor(float(losses_BE.shape[1])))

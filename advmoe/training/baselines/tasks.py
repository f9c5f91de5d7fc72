"""Training tasks of published mixtures under our protocol: the same pre-trained experts, attacks, epochs, optimizer and
selection. They differ in how the experts are weighted, and in which parameters are trained.

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
from advmoe.training.losses.expert_losses import flatten_experts, log_prob_of_class


class LastLayersTask(MixtureTask):
    """MoRE (Cheng et al. 2021, arXiv 2104.10586): the experts are frozen, BatchNorm statistics included; the gate and
    the experts' last layers are trained, adversarially.
    """

    def __init__(self, model: MixtureOfExperts, config: JointConfig) -> None:
        super().__init__(model, config)
        self.heads = nn.ModuleList([expert.get_submodule("classify") for expert in model.experts])
        model.experts.requires_grad_(False)
        self.heads.requires_grad_(True)

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns SGD over last layers and gate."""
        pairs = [(self.heads, self.config.optimizer.lr), (self.mixture.gate, self.config.gate_lr)]
        return sgd(pairs, self.config.optimizer)

    def on_step_start(self) -> None:
        """Puts the gate into train mode; the experts stay in eval mode."""
        super().on_step_start()
        self.mixture.experts.eval()


class AlternatingTask(MixtureTask):
    """After AdvMoE (Zhang et al., ICCV 2023): hard routing; gate and experts are updated in alternation, adversarially,
    each while the other is frozen.

    AdvMoE routes inside the network, layer by layer, to pathways of one backbone. Here whole networks are chosen, a
    different and coarser model; the comparison is about the alternation and the hard choice. Each turn is one batch, so
    that the number of batches is the same as for the others.
    """

    def __init__(self, model: MixtureOfExperts, config: JointConfig) -> None:
        super().__init__(model, config)
        self.turn = 0

    def on_step_start(self) -> None:
        """Switches between training the gate and training the experts."""
        super().on_step_start()
        routing = self.turn % 2 == 0
        self.turn += 1
        self.mixture.gate.requires_grad_(routing)
        self.mixture.experts.requires_grad_(not routing)
        if routing:
            self.mixture.experts.eval()
        else:
            self.mixture.gate.eval()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of a mixture task, and the number of turns."""
        return {**super().state_dict(), "turn": torch.tensor(self.turn)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a `state_dict`. Raises UserError for a state without the number of turns."""
        norms = dict(state)
        turn = norms.pop("turn", torch.zeros(()))
        if turn.dtype != torch.int64 or turn.ndim:
            raise UserError("does not hold the number of turns")
        super().load_state_dict(norms)
        self.turn = int(turn)


class SynergyTask(MixtureTask):
    """Synergy-of-Experts (Cui et al., NeurIPS 2022): each expert learns the images it is best at, and its confidence.

    Per image the experts' cross-entropies are combined by a smooth minimum, -log mean_e exp(-CE_e), so that the
    gradient goes to the experts that are nearly right; each confidence learns the probability that its expert gives to
    the true class, by binary cross-entropy. The paper attacks every sub-model by itself; under the common protocol the
    batch is attacked through the whole mixture, with a straight-through choice. `own_loss`, `load_balance`
    and `recipe` are ignored; with `adversary: trades` the images are attacked as in TRADES, but its loss is not used.
    """

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns the smooth minimum of the experts' losses plus that of their confidences, a mean over the batch."""
        del clean_BCHW
        assert isinstance(self.mixture, ConfidentExperts)
        features_BEF = self.mixture.features(images_BCHW)
        log_probs_NK, labels_N = flatten_experts(self.mixture.classify_features(features_BEF), labels_B)
        true_log_prob_BE = log_prob_of_class(log_probs_NK, labels_N).view(features_BEF.shape[:2])
        return (smooth_minimum(-true_log_prob_BE) + self._confidence_loss(features_BEF, true_log_prob_BE)).mean()

    def _confidence_loss(self, features_BEF: Tensor, true_log_prob_BE: Tensor) -> Tensor:
        assert isinstance(self.mixture, ConfidentExperts)
        confidence_BE = self.mixture.gate.confidence(features_BEF)
        target_BE = true_log_prob_BE.detach().exp()
        return functional.binary_cross_entropy_with_logits(confidence_BE, target_BE, reduction="none").mean(dim=1)


def smooth_minimum(losses_BE: Tensor) -> Tensor:
    """Returns -log mean_e exp(-loss_e) (B,): between the minimum and the mean of the experts' losses."""
    return -torch.logsumexp(-losses_BE, dim=1) + torch.log(torch.tensor(float(losses_BE.shape[1])))

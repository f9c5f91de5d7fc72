"""Joint training: gate and experts together, attacked through the whole mixture (arXiv 2512.20821).

Shapes: B batch, C channel, H/W pixels, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.core.settings import Fraction01, NonNegativeFloat, PositiveFloat, Settings
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import Backbone, GateSettings, Mixture, NoGate, OwnConfidence
from advmoe.models.gate_statistics import entropy, gate_weights, shift
from advmoe.models.mixture import Mixing, MixtureOfExperts
from advmoe.runtime.checkpoints import workdir
from advmoe.training import flops
from advmoe.training.batch_attacks import Adversary, TradesBatches
from advmoe.training.config import ValidatedTrainingConfig, sgd
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.dwf import Dwf
from advmoe.training.losses.expert_losses import own_losses
from advmoe.training.losses.registry import Objective
from advmoe.training.losses.trades import Trades
from advmoe.training.pretrained_experts import backbone_of, input_hashes, load_experts
from advmoe.training.stage_outputs import write_outputs
from advmoe.training.trainer import DIGITS, Row, TrainingJob, TrainingResult, TrainingTask, fit


class Alarms(Settings):
    """When the gate's health is worth an alarm.

    `load`: one expert's mean weight above this is a collapse; `gradient`: a gate whose mean gradient norm over an epoch
    is below this learns nothing.
    """

    load: Fraction01
    gradient: PositiveFloat


class JointConfig(ValidatedTrainingConfig):
    """A recipe, and what only a mixture has.

    `recipe`: what is learned from an attacked batch, the paper's `dwf` or another of `advmoe.training.losses`;
    `gate_lr`: the gate's own peak learning rate; `own_loss`: weight of the experts' own cross-entropies beside the
    mixture's, 0 for none; `load_balance`: weight of the squared coefficient of variation of the mean gate weights
    (Shazeer et al. 2017), 0 for none; `checkpointing`: keep one expert's activations at a time and compute them again
    in the backward pass, which takes less memory and more time, and changes no number.
    """

    recipe: Objective
    experts: tuple[str, ...]
    gate: GateSettings
    mixing: Literal["probabilities", "logits"]
    adversary: Adversary
    gate_lr: PositiveFloat
    own_loss: NonNegativeFloat
    load_balance: NonNegativeFloat
    checkpointing: bool
    alarms: Alarms

    @model_validator(mode="after")
    def _one_loss(self) -> "JointConfig":
        if not isinstance(self.recipe, Dwf) and isinstance(self.adversary, TradesBatches):
            raise ValueError(
                f"recipe {self.recipe.kind} and adversary trades each bring a loss of the answer; one of them must go"
            )
        return self

    @property
    def objective(self) -> Objective | Trades:
        """What is minimised: the recipe's, or that of TRADES, whose batches bring a loss of their own."""
        return Trades(self.adversary.beta) if isinstance(self.adversary, TradesBatches) else self.recipe


def load_imbalance(log_gate_BE: Tensor) -> Tensor:
    """Squared coefficient of variation of the batch's mean weight per expert: 0 when all experts are used alike."""
    load_E = log_gate_BE.exp().mean(dim=0)
    imbalance: Tensor = load_E.var(correction=0) / load_E.mean().square()
    return imbalance


class MixtureTask:
    """Cross-entropy of the mixed log-probabilities, or what else the recipe or TRADES makes of them, plus the experts'
    own losses and load balance; watches the gate.
    """

    def __init__(self, model: MixtureOfExperts, recipe: JointConfig) -> None:
        self.model: nn.Module = model
        self.mixture = model
        self.mixture.checkpointing = recipe.checkpointing
        self.recipe = recipe
        self.gate_norms: list[Tensor] = []

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with a learning rate for the experts and one for the gate."""
        pairs = [(self.mixture.experts, self.recipe.optimizer.lr), (self.mixture.gate, self.recipe.gate_lr)]
        return sgd(pairs, self.recipe.optimizer)

    def begin(self) -> None:
        """All of the mixture learns."""
        self.mixture.train()

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """What the recipe asks, the experts' own losses and the imbalance of the load, weighted.

        All of it is about the attacked images; some recipes compare their answers with those to the clean ones. The
        load is that of the images at hand: where a batch is learned from in pieces, each has to balance its own.
        """
        parts = self.mixture.parts(images_BCHW)
        loss = self.recipe.objective.loss(Batch(self.mixture, parts, labels_B, clean_BCHW))
        if self.recipe.own_loss:
            loss = loss + self.recipe.own_loss * own_losses(parts.logits_BEK, labels_B)
        return loss + self.recipe.load_balance * load_imbalance(parts.log_gate_BE)

    def after_backward(self) -> None:
        """Remember the norm of the gate's gradient, where it has one."""
        gradients = [parameter.grad for parameter in self.mixture.gate.parameters() if parameter.grad is not None]
        if gradients:
            self.gate_norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())

    def health(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """Gate gradient, entropy (nats), shift under attack (total variation) and each expert's mean weight."""
        assert isinstance(model, MixtureOfExperts)
        clean_NE, attacked_NE = gate_weights(model, clean_NCHW), gate_weights(model, attacked_NCHW)
        row = {"gate_gradient": float(torch.stack(self.gate_norms).mean())} if self.gate_norms else {}
        row |= {
            "gate_entropy": float(entropy(clean_NE)),
            "gate_shift": float(shift(clean_NE, attacked_NE)),
        }
        loads = zip(self.recipe.experts, clean_NE.mean(dim=0).tolist(), strict=True)
        row |= {f"load_{name}": load for name, load in loads}
        return {name: round(value, DIGITS) for name, value in row.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """Gate and load; the gradient of a gate that has none is left out."""
        return ("gate_entropy", "gate_shift", *(f"load_{name}" for name in self.recipe.experts))

    def epoch_ends(self) -> None:
        """Forget the norms of this epoch."""
        self.gate_norms.clear()

    def state(self) -> dict[str, Tensor]:
        """The norms of this epoch."""
        return {"gate_norms": torch.stack(self.gate_norms)} if self.gate_norms else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these norms."""
        norms = state.get("gate_norms", torch.zeros(0))
        if state.keys() - {"gate_norms"} or norms.ndim != 1 or norms.dtype != torch.float32:
            raise UserError("holds no norms of a gate")
        self.gate_norms = list(norms)


def alarms(history: list[Row], kept: Row, recipe: JointConfig) -> list[str]:
    """What went wrong with the gate, judged on the epoch that was kept (load) and on every epoch (gradient). Over one
    expert a gate has nothing to learn, and nothing goes wrong.
    """
    if len(recipe.experts) == 1:
        return []
    load = {name: kept[f"load_{name}"] for name in recipe.experts}
    found = [
        f"gate: collapsed, expert {name} has {share:.0%} of the weight"
        for name, share in load.items()
        if share > recipe.alarms.load
    ]
    dead = [row["epoch"] for row in history if row.get("gate_gradient", torch.inf) < recipe.alarms.gradient]
    if dead:
        found.append(f"gate: no gradient in epoch {dead[0]}, it does not learn")
    return found


@dataclass(frozen=True)
class Design:
    """What tells one mixture from another: what weighs the experts, how votes are mixed, and how all of it learns."""

    gate: GateSettings | NoGate | OwnConfidence
    mixing: Mixing
    learner: Callable[[MixtureOfExperts, JointConfig], TrainingTask]

    def architecture(self, backbone: Backbone, experts: tuple[str, ...]) -> Mixture:
        """The network itself, as a header describes it."""
        return Mixture(kind="mixture", backbone=backbone, experts=experts, gate=self.gate, mixing=self.mixing)


def paper_design(recipe: JointConfig) -> Design:
    """The defence of arXiv 2512.20821: a soft gate, and everything learns together."""
    return Design(recipe.gate, recipe.mixing, MixtureTask)


def train_mixture(
    experts: list[nn.Module],
    backbone: Backbone,
    dataset: Dataset,
    recipe: JointConfig,
    *,
    seed: int,
    epsilon: float,
    spent: int = 0,
    name: str = "mixture",
    design: Design | None = None,
    shelf: Path | None = None,
) -> tuple[TrainingResult, Mixture]:
    """Train gate and copies of `experts` (in the order of `recipe.experts`) jointly; the architecture comes along.

    `spent`: operations that the experts took; `name`: whose random numbers these are; `design`: the paper's, if none;
    `shelf`: where to keep what is unfinished.
    """
    design = design or paper_design(recipe)
    architecture = design.architecture(backbone, recipe.experts)
    mixture = classifiers.build_mixture(architecture, dataset.facts, experts, seed, name)
    course = TrainingJob(
        name=name,
        seed=seed,
        dataset=dataset,
        recipe=recipe,
        adversary=recipe.adversary,
        epsilon=epsilon,
        select_by="pgd",
        spent=spent,
        shelf=shelf,
    )
    trained = fit(design.learner(mixture, recipe), course)
    trained.alarms.extend(alarms(trained.history, trained.kept, recipe))
    return trained, architecture


def train_and_record(
    stage: str,
    name: str,
    label: str,
    recipe: JointConfig,
    data: Dataset,
    *,
    seed: int,
    epsilon: float,
    design: Design | None = None,
    settings: Mapping[str, Settings] = MappingProxyType({}),
) -> None:
    """Train a mixture of the pre-trained experts, its random numbers drawn under `label`, and write it as `name` of
    `stage`; `settings`: what else its header should tell.
    """
    experts = load_experts(recipe.experts, data)
    made_from = input_hashes(data, experts)
    with workdir.open_workdir(f"{stage}-{name}", dict(settings), recipe, seed, epsilon, made_from) as shelf:
        trained, architecture = train_mixture(
            [expert.model for expert in experts.values()],
            backbone_of(experts),
            data,
            recipe,
            seed=seed,
            epsilon=epsilon,
            spent=flops.total_prior_flops(experts),
            name=label,
            design=design,
            shelf=shelf,
        )
        write_outputs(
            stage,
            name,
            trained,
            architecture,
            data.facts,
            params={"recipe": recipe, "epsilon": epsilon, **settings},
            inputs=made_from,
            seed=seed,
        )

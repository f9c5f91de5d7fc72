"""Joint training: gate and experts together, attacked through the whole mixture (arXiv 2512.20821).

Shapes: B batch, C channel, H/W pixels, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.core.settings import Fraction01, NonNegativeFloat, PositiveFloat, Settings
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import (
    BackboneSettings,
    ConfidenceSettings,
    GateSettings,
    MixtureArchitecture,
    UniformGateSettings,
)
from advmoe.models.gate_statistics import entropy, gate_weights, total_variation
from advmoe.models.mixture import Mixing, MixtureOfExperts
from advmoe.runtime.checkpoints import workdir
from advmoe.training import flops
from advmoe.training.batch_attacks import Adversary, TradesBatches
from advmoe.training.config import ValidatedTrainingConfig, sgd
from advmoe.training.job import DIGITS, Row, TrainingJob, TrainingResult, TrainingTask
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.dwf import Dwf
from advmoe.training.losses.expert_losses import expert_cross_entropy
from advmoe.training.losses.registry import Objective
from advmoe.training.losses.trades import TradesLoss
from advmoe.training.pretrained_experts import backbone_of, input_hashes, load_experts
from advmoe.training.stage_outputs import write_outputs
from advmoe.training.trainer import fit


class AlarmThresholds(Settings):
    """Thresholds of the alarms about the gate.

    `load`: a mean weight of one expert above this is a collapse; `gradient`: a gate whose mean gradient norm over an
    epoch is below this does not learn.
    """

    load: Fraction01
    gradient: PositiveFloat


class JointConfig(ValidatedTrainingConfig):
    """The settings of joint training.

    `recipe`: the loss on an attacked batch, the paper's `dwf` or another of `advmoe.training.losses`; `gate_lr`: the
    gate's peak learning rate; `own_loss`: weight of the experts' own cross-entropies, added to the mixture's loss, 0
    for none; `load_balance`: weight of the squared coefficient of variation of the mean gate weights
    (Shazeer et al. 2017), 0 for none; `checkpointing`: keep one expert's activations at a time and recompute
    them in the backward pass, which takes less memory and more time, and changes no number.
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
    alarms: AlarmThresholds

    @model_validator(mode="after")
    def _validate_loss(self) -> "JointConfig":
        if not isinstance(self.recipe, Dwf) and isinstance(self.adversary, TradesBatches):
            raise ValueError(
                f"recipe {self.recipe.kind} and adversary trades each define the mixture's loss; choose one"
            )
        return self

    @property
    def objective(self) -> Objective | TradesLoss:
        """The loss on an attacked batch: `recipe`, replaced by the loss of TRADES if `adversary` is `trades`."""
        return TradesLoss(self.adversary.beta) if isinstance(self.adversary, TradesBatches) else self.recipe


def load_imbalance(log_gate_BE: Tensor) -> Tensor:
    """Returns the squared coefficient of variation of the batch's mean weight per expert: 0 for equal loads."""
    load_E = log_gate_BE.exp().mean(dim=0)
    imbalance: Tensor = load_E.var(correction=0) / load_E.mean().square()
    return imbalance


class MixtureTask:
    """The loss that the recipe or TRADES defines on the mixture's output, plus the experts' own losses and the load
    balance; records statistics of the gate.
    """

    def __init__(self, model: MixtureOfExperts, config: JointConfig) -> None:
        self.model: nn.Module = model
        self.mixture = model
        self.mixture.checkpointing = config.checkpointing
        self.config = config
        self.gate_norms: list[Tensor] = []

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns SGD with one learning rate for the experts and one for the gate."""
        pairs = [(self.mixture.experts, self.config.optimizer.lr), (self.mixture.gate, self.config.gate_lr)]
        return sgd(pairs, self.config.optimizer)

    def on_step_start(self) -> None:
        """Puts the whole mixture into train mode."""
        self.mixture.train()

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns the weighted sum of the recipe's loss, the experts' own losses and the load imbalance.

        All terms are those of the attacked images; some recipes compare them with the output on clean ones. The load
        is balanced over the images given: with micro-batches, over each of them.
        """
        output = self.mixture.forward_parts(images_BCHW)
        loss = self.config.objective.loss(Batch(self.mixture, output, labels_B, clean_BCHW))
        if self.config.own_loss:
            loss = loss + self.config.own_loss * expert_cross_entropy(output.logits_BEK, labels_B)
        return loss + self.config.load_balance * load_imbalance(output.log_gate_BE)

    def on_after_backward(self) -> None:
        """Records the norm of the gate's gradient, if it has one."""
        gradients = [parameter.grad for parameter in self.mixture.gate.parameters() if parameter.grad is not None]
        if gradients:
            self.gate_norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())

    def validation_metrics(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """Returns gate gradient, entropy (nats), shift under attack (total variation) and each expert's mean weight."""
        assert isinstance(model, MixtureOfExperts)
        clean_NE, attacked_NE = gate_weights(model, clean_NCHW), gate_weights(model, attacked_NCHW)
        row = {"gate_gradient": float(torch.stack(self.gate_norms).mean())} if self.gate_norms else {}
        row |= {
            "gate_entropy": float(entropy(clean_NE)),
            "gate_shift": float(total_variation(clean_NE, attacked_NE)),
        }
        loads = zip(self.config.experts, clean_NE.mean(dim=0).tolist(), strict=True)
        row |= {f"load_{name}": load for name, load in loads}
        return {name: round(value, DIGITS) for name, value in row.items()}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Gate and load; not the gradient, which a gate without parameters does not have."""
        return ("gate_entropy", "gate_shift", *(f"load_{name}" for name in self.config.experts))

    def on_epoch_end(self) -> None:
        """Clears the gradient norms of the epoch."""
        self.gate_norms.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the gradient norms of the epoch."""
        return {"gate_norms": torch.stack(self.gate_norms)} if self.gate_norms else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the gradient norms of the epoch. Raises UserError for anything else."""
        norms = state.get("gate_norms", torch.zeros(0))
        if state.keys() - {"gate_norms"} or norms.ndim != 1 or norms.dtype != torch.float32:
            raise UserError("does not hold the gradient norms of a gate")
        self.gate_norms = list(norms)


def gate_alarms(history: list[Row], kept: Row, config: JointConfig) -> list[str]:
    """Returns alarms about the gate: a collapse in the epoch that is kept, and missing gradients in any epoch. None
    for a single expert, for which a gate has nothing to learn.
    """
    if len(config.experts) == 1:
        return []
    load = {name: kept[f"load_{name}"] for name in config.experts}
    alarms = [
        f"gate: collapsed, expert {name} has {share:.0%} of the weight"
        for name, share in load.items()
        if share > config.alarms.load
    ]
    dead = [row["epoch"] for row in history if row.get("gate_gradient", torch.inf) < config.alarms.gradient]
    if dead:
        alarms.append(f"gate: no gradient in epoch {dead[0]}, it does not learn")
    return alarms


@dataclass(frozen=True)
class MixtureDesign:
    """The gate of a mixture, how it mixes the experts' outputs, and its training task."""

    gate: GateSettings | UniformGateSettings | ConfidenceSettings
    mixing: Mixing
    make_task: Callable[[MixtureOfExperts, JointConfig], TrainingTask]

    def architecture(self, backbone: BackboneSettings, experts: tuple[str, ...]) -> MixtureArchitecture:
        """Returns the architecture, as the header of a file holds it."""
        return MixtureArchitecture(
            kind="mixture", backbone=backbone, experts=experts, gate=self.gate, mixing=self.mixing
        )


def paper_design(config: JointConfig) -> MixtureDesign:
    """Returns the defence of arXiv 2512.20821: a soft gate, and gate and experts are trained together."""
    return MixtureDesign(config.gate, config.mixing, MixtureTask)


@dataclass(frozen=True)
class JointRun:
    """The joint training of a gate and copies of `experts`, in the order of `config.experts`.

    `name` seeds its random streams; `design`: None for the paper's; `prior_flops`: operations that the training of the
    experts took; `inputs`: hashes of data set and experts; `checkpoint_dir`: folder of checkpoints, None for none.
    """

    experts: Sequence[nn.Module]
    backbone: BackboneSettings
    dataset: Dataset
    config: JointConfig
    seed: int
    epsilon: float
    name: str = "mixture"
    design: MixtureDesign | None = None
    prior_flops: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    checkpoint_dir: Path | None = None

    @property
    def job(self) -> TrainingJob:
        """A mixture is selected by PGD accuracy."""
        return TrainingJob(
            name=self.name,
            seed=self.seed,
            dataset=self.dataset,
            config=self.config,
            adversary=self.config.adversary,
            epsilon=self.epsilon,
            select_by="pgd",
            prior_flops=self.prior_flops,
            checkpoint_dir=self.checkpoint_dir,
        )


def pretrained_run(dataset: Dataset, config: JointConfig, *, seed: int, epsilon: float) -> JointRun:
    """Returns the joint training of the pre-trained experts in artifacts/. Raises UserError when one is missing, was
    trained on other data, or has another backbone.
    """
    experts = load_experts(config.experts, dataset)
    return JointRun(
        experts=[expert.model for expert in experts.values()],
        backbone=backbone_of(experts),
        dataset=dataset,
        config=config,
        seed=seed,
        epsilon=epsilon,
        prior_flops=flops.total_prior_flops(experts),
        inputs=input_hashes(dataset, experts),
    )


def train_mixture(run: JointRun) -> tuple[TrainingResult, MixtureArchitecture]:
    """Trains gate and copies of the experts jointly; returns the result and the architecture."""
    config, design = run.config, run.design or paper_design(run.config)
    architecture = design.architecture(run.backbone, config.experts)
    mixture = classifiers.build_mixture(architecture, run.dataset.facts, list(run.experts), run.seed, run.name)
    result = fit(design.make_task(mixture, config), run.job)
    result.alarms.extend(gate_alarms(result.history, result.kept, config))
    return result, architecture


def train_and_save(stage: str, name: str, run: JointRun, settings: Mapping[str, Settings] | None = None) -> None:
    """Trains a mixture and writes it as `name` of `stage`; `settings` are added to the params in its header. Resumes a
    killed run.
    """
    settings = dict(settings or {})
    work = (settings, run.config, run.seed, run.epsilon, run.inputs)
    with workdir.open_workdir(f"{stage}-{name}", *work) as checkpoint_dir:
        result, architecture = train_mixture(replace(run, checkpoint_dir=checkpoint_dir))
        write_outputs(
            stage,
            name,
            result,
            architecture,
            run.dataset.facts,
            params={"recipe": run.config, "epsilon": run.epsilon, **settings},
            inputs=run.inputs,
            seed=run.seed,
        )

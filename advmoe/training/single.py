"""Trains one plain network, an expert or a baseline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from advmoe.core import stage_inputs
from advmoe.core.errors import UserError
from advmoe.core.references import refuse_removed_keys
from advmoe.core.settings import Epsilon, Seed, Settings
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.checkpoints import workdir
from advmoe.runtime.machine import derive_seed
from advmoe.training.batch_attacks import Adversary, TradesBatches
from advmoe.training.config import TrainingConfig, ValidatedTrainingConfig, sgd
from advmoe.training.job import Row, TrainingJob, TrainingResult, TrainingTask
from advmoe.training.stage_outputs import write_outputs
from advmoe.training.trades import trades_loss
from advmoe.training.trainer import fit


class NetworkSpec(Settings):
    """One network to train: the adversary of its training batches, and a seed of its own."""

    adversary: Adversary
    seed: Seed

    @model_validator(mode="before")
    @classmethod
    def _refuse_removed_keys(cls, value: object) -> object:
        return refuse_removed_keys(value)

    @property
    def uses_threat_epsilon(self) -> bool:
        """Whether training batches are attacked at the threat model's epsilon."""
        return stage_inputs.uses_threat_epsilon(self.adversary.kind)


class SingleConfig(ValidatedTrainingConfig):
    """A training config; `validation_epsilon`: for networks that are not trained at the threat model's epsilon."""

    validation_epsilon: Epsilon


def baseline_config(pretrain: SingleConfig, joint_epochs: int) -> SingleConfig:
    """Returns the config of plain baselines: the experts', for as many epochs as the mixture's two phases have."""
    return pretrain.model_copy(update={"epochs": pretrain.epochs + joint_epochs})


class PlainTask:
    """Cross-entropy on the attacked images."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.model = model
        self.config = config

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns SGD over all parameters."""
        return sgd([(self.model, self.config.optimizer.lr)], self.config.optimizer)

    def on_step_start(self) -> None:
        """Puts the model into train mode."""
        self.model.train()

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns the mean cross-entropy on the attacked images; `clean_BCHW` is not used."""
        del clean_BCHW
        return functional.cross_entropy(self.model(images_BCHW), labels_B)

    def on_after_backward(self) -> None:
        """Does nothing: a plain network has no gate."""

    def validation_metrics(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """Returns no additional columns."""
        del model, clean_NCHW, attacked_NCHW
        return {}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """No columns."""
        return ()

    def on_epoch_end(self) -> None:
        """Does nothing: there are no statistics to reset."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError for any state."""
        if state:
            raise UserError("holds tensors that a plain network does not have")


class TradesTask(PlainTask):
    """The two terms of TRADES: accuracy on clean images, and the same output on attacked ones (Zhang et al. 2019)."""

    def __init__(self, model: nn.Module, config: TrainingConfig, beta: float) -> None:
        super().__init__(model, config)
        self.beta = beta

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns the cross-entropy on the clean images plus beta times the divergence on the attacked ones."""
        return trades_loss(self.model(clean_BCHW), self.model(images_BCHW), labels_B, self.beta)


def task_for(spec: NetworkSpec, model: nn.Module, config: TrainingConfig) -> TrainingTask:
    """Returns the task of a network: TRADES if its adversary is TRADES', else cross-entropy."""
    if isinstance(spec.adversary, TradesBatches):
        return TradesTask(model, config, spec.adversary.beta)
    return PlainTask(model, config)


TaskFactory = Callable[[NetworkSpec, nn.Module, TrainingConfig], TrainingTask]


@dataclass(frozen=True)
class SingleRun:
    """The training of one plain network. `name` seeds its random streams.

    `epsilon`: the threat model's, None for networks that are not trained at it; `make_task`: creates the task;
    `prior_flops`: operations of the training of a teacher; `inputs`: hashes of inputs in addition to the data set, such
    as a teacher; `checkpoint_dir`: folder of checkpoints, None for none.
    """

    name: str
    spec: NetworkSpec
    backbone: BackboneSettings
    dataset: Dataset
    config: SingleConfig
    seed: int
    epsilon: float | None
    make_task: TaskFactory = task_for
    prior_flops: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    checkpoint_dir: Path | None = None

    @property
    def architecture(self) -> PlainArchitecture:
        """The architecture of the network."""
        return PlainArchitecture(kind="plain", backbone=self.backbone)

    @property
    def job(self) -> TrainingJob:
        """The job. Networks trained at the threat model's epsilon are validated at it and selected by PGD accuracy, the
        others are validated at the config's fixed radius and selected by clean accuracy.
        """
        assert (self.epsilon is not None) == self.spec.uses_threat_epsilon
        return TrainingJob(
            name=self.name,
            seed=derive_seed(self.seed, self.spec.seed),
            dataset=self.dataset,
            config=self.config,
            adversary=self.spec.adversary,
            epsilon=self.config.validation_epsilon if self.epsilon is None else self.epsilon,
            select_by="pgd" if self.spec.uses_threat_epsilon else "clean",
            prior_flops=self.prior_flops,
            checkpoint_dir=self.checkpoint_dir,
        )


def train_single(run: SingleRun) -> TrainingResult:
    """Trains one plain network from random weights."""
    model = classifiers.build(run.architecture, run.dataset.facts, run.seed, run.name, run.spec.seed)
    return fit(run.make_task(run.spec, model, run.config), run.job)


def train_and_save(stage: str, name: str, run: SingleRun) -> None:
    """Trains one plain network and writes it as `name` of `stage`. Resumes a killed run."""
    inputs = {"dataset": run.dataset.sha256, **run.inputs}
    work = (run.spec, run.backbone, run.config, run.seed, run.epsilon, inputs)
    with workdir.open_workdir(f"{stage}-{name}", *work) as checkpoint_dir:
        result = train_single(replace(run, checkpoint_dir=checkpoint_dir))
        write_outputs(
            stage,
            name,
            result,
            run.architecture,
            run.dataset.facts,
            params={"recipe": run.config, "student": run.spec, "epsilon": run.epsilon},
            inputs=inputs,
            seed=run.seed,
        )

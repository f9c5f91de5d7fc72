"""Training one plain network: an expert or a baseline, the same code."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, Seed, Settings
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import Backbone, Plain
from advmoe.runtime.checkpoints import workdir
from advmoe.runtime.machine import derive_seed
from advmoe.training.batch_attacks import Adversary, CleanBatches, FgsmBatches, TradesBatches
from advmoe.training.config import TrainingConfig, ValidatedTrainingConfig, sgd
from advmoe.training.stage_outputs import write_outputs
from advmoe.training.trades import trades_loss
from advmoe.training.trainer import Row, TrainingJob, TrainingResult, TrainingTask, fit


class NetworkSpec(Settings):
    """One network to train: its adversary, its own seed, and the top-level parameter it depends on.

    `reads` is what dvc.yaml puts among the stage's params: `epsilon` for whoever meets the threat model in training,
    `seed` (which everybody reads anyway) for the others, so that `-S epsilon=...` does not retrain them.
    """

    adversary: Adversary
    seed: Seed
    reads: Literal["seed", "epsilon"]

    def model_post_init(self, context: object) -> None:
        """Raises ValueError when `reads` hides a dependency from DVC, or invents one."""
        del context
        needed = "epsilon" if self.meets_threat_model else "seed"
        if self.reads != needed:
            raise ValueError(f"reads must be {needed} for a '{self.adversary.kind}' adversary")

    @property
    def meets_threat_model(self) -> bool:
        """Whether training attacks at the top-level epsilon."""
        return not isinstance(self.adversary, CleanBatches | FgsmBatches)


class SingleConfig(ValidatedTrainingConfig):
    """A recipe, and the fixed radius at which networks that do not meet the threat model are validated."""

    validation_epsilon: Epsilon


def baseline_recipe(pretrain: SingleConfig, joint_epochs: int) -> SingleConfig:
    """The recipe of plain networks that stand beside the mixture: the experts', for as many epochs in total."""
    return pretrain.model_copy(update={"epochs": pretrain.epochs + joint_epochs})


class PlainLearner:
    """Cross-entropy on whatever the batch was attacked with."""

    def __init__(self, model: nn.Module, recipe: TrainingConfig) -> None:
        self.model = model
        self.recipe = recipe

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD over all parameters."""
        return sgd([(self.model, self.recipe.optimizer.lr)], self.recipe.optimizer)

    def begin(self) -> None:
        """Train mode."""
        self.model.train()

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Mean cross-entropy; what the images were before the attack does not matter."""
        del clean_BCHW
        return functional.cross_entropy(self.model(images_BCHW), labels_B)

    def after_backward(self) -> None:
        """Nothing to look at: a plain network has no gate."""

    def health(self, model: nn.Module, clean_NCHW: Tensor, attacked_NCHW: Tensor) -> Row:
        """No further columns."""
        del model, clean_NCHW, attacked_NCHW
        return {}

    @property
    def columns(self) -> tuple[str, ...]:
        """None."""
        return ()

    def epoch_ends(self) -> None:
        """Nothing is counted."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to remember."""
        if state:
            raise UserError("remembers what a plain network does not")


class TradesLearner(PlainLearner):
    """TRADES' two terms: right on clean images, and the same answer on attacked ones (Zhang et al. 2019)."""

    def __init__(self, model: nn.Module, recipe: TrainingConfig, beta: float) -> None:
        super().__init__(model, recipe)
        self.beta = beta

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Cross-entropy on the clean images plus beta times the divergence on the attacked ones."""
        return trades_loss(self.model(clean_BCHW), self.model(images_BCHW), labels_B, self.beta)


def task_for(student: NetworkSpec, model: nn.Module, recipe: TrainingConfig) -> TrainingTask:
    """How this student learns: from cross-entropy, or as TRADES does."""
    if isinstance(student.adversary, TradesBatches):
        return TradesLearner(model, recipe, student.adversary.beta)
    return PlainLearner(model, recipe)


TaskFactory = Callable[[NetworkSpec, nn.Module, TrainingConfig], TrainingTask]


def train_single(
    name: str,
    student: NetworkSpec,
    backbone: Backbone,
    dataset: Dataset,
    recipe: SingleConfig,
    *,
    seed: int,
    epsilon: float | None,
    shelf: Path | None = None,
    learner: TaskFactory = task_for,
    spent: int = 0,
) -> TrainingResult:
    """Train one plain network. `epsilon` is the threat model's, None for students that do not meet it; `shelf`: where
    to keep what is unfinished; `learner`: makes the learner; `spent`: operations that went into what it learns from.

    Students that meet the threat model are validated and selected at its epsilon, the others at the recipe's fixed
    one; those are selected by clean accuracy.
    """
    meets = student.meets_threat_model
    assert (epsilon is not None) == meets
    model = classifiers.build(Plain(kind="plain", backbone=backbone), dataset.facts, seed, name, student.seed)
    course = TrainingJob(
        name=name,
        seed=derive_seed(seed, student.seed),
        dataset=dataset,
        recipe=recipe,
        adversary=student.adversary,
        epsilon=recipe.validation_epsilon if epsilon is None else epsilon,
        select_by="pgd" if meets else "clean",
        spent=spent,
        shelf=shelf,
    )
    return fit(learner(student, model, recipe), course)


def train_and_record(
    stage: str,
    name: str,
    label: str,
    student: NetworkSpec,
    backbone: Backbone,
    dataset: Dataset,
    recipe: SingleConfig,
    *,
    seed: int,
    epsilon: float | None,
    learner: TaskFactory = task_for,
    spent: int = 0,
    made_from: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Train one plain network, its random numbers drawn under `label`, and write it as `name` of `stage`; `made_from`:
    hashes of what else than the data it learns from, and the others as in `train_single`.
    """
    inputs = {"dataset": dataset.sha256, **made_from}
    with workdir.open_workdir(f"{stage}-{name}", student, backbone, recipe, seed, epsilon, inputs) as shelf:
        trained = train_single(
            label,
            student,
            backbone,
            dataset,
            recipe,
            seed=seed,
            epsilon=epsilon,
            shelf=shelf,
            learner=learner,
            spent=spent,
        )
        write_outputs(
            stage,
            name,
            trained,
            Plain(kind="plain", backbone=backbone),
            dataset.facts,
            params={"recipe": recipe, "student": student, "epsilon": epsilon},
            inputs=inputs,
            seed=seed,
        )

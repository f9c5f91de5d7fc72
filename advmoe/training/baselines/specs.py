"""Entries of the baselines in params.yaml: plain networks of several sizes and budgets, and published mixtures.

All are trained with the same config. A plain network is trained as an expert is, for as many epochs as the mixture's
two phases have together, unless it matches the mixture's operations; a mixture baseline starts from the mixture's own
pre-trained experts, and its training replaces the joint phase.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from advmoe.core.references import refuse_removed_keys
from advmoe.core.settings import PositiveFloat, Settings, load_section
from advmoe.data.dataset import Dataset, DatasetInfo
from advmoe.models import classifiers
from advmoe.models.classifiers import (
    Architecture,
    BackboneKind,
    BackboneSettings,
    ConfidenceSettings,
    MixtureArchitecture,
    PlainArchitecture,
    UniformGateSettings,
)
from advmoe.models.mixture import MixtureOfExperts
from advmoe.training.baselines.distillation import DistillationTask
from advmoe.training.baselines.tasks import AlternatingTask, LastLayersTask, SynergyTask
from advmoe.training.batch_attacks import Adversary, CleanBatches, TradesBatches, expected_passes
from advmoe.training.config import TrainingConfig, ValidatedTrainingConfig
from advmoe.training.flops import SAMPLE_SIZE, FlopsPerImage, HasLoss, count_parameters, measure_flops
from advmoe.training.joint import JointConfig, MixtureDesign, MixtureTask, paper_design
from advmoe.training.single import NetworkSpec, SingleConfig, task_for


class SingleNetwork(NetworkSpec):
    """A plain network with `backbone` at the project's `model.width`, trained as the experts are, for as many epochs as
    the mixture's two phases have together. `match: parameters` widens it to the mixture's number of parameters.
    """

    kind: Literal["single"]
    backbone: BackboneKind
    match: Literal["nothing", "parameters", "passes"]

    @model_validator(mode="after")
    def _passes_are_a_kind(self) -> "SingleNetwork":
        if self.kind == "single" and self.match == "passes":
            raise ValueError("'match: passes' is 'kind: equal-passes' now; replace one by the other")
        return self


class EqualPassesNetwork(SingleNetwork):
    """A plain network trained for as many operations as the training of the whole mixture takes, experts included."""

    kind: Literal["equal-passes"]  # type: ignore[assignment]
    match: Literal["passes"] = "passes"


class DistilledNetwork(NetworkSpec):
    """A plain network at the project's `model.width` that learns the trained mixture's outputs, see
    `advmoe.training.baselines.distillation`; `alpha` in [0, 1] is the weight of the attacked images in its loss.
    """

    kind: Literal["distilled"]
    backbone: BackboneKind
    alpha: Annotated[float, Field(ge=0, le=1)]

    def model_post_init(self, context: object) -> None:
        """Raises ValueError for an adversary that has no attacked images of its own."""
        super().model_post_init(context)
        if isinstance(self.adversary, CleanBatches | TradesBatches):
            raise ValueError(
                f"a '{self.adversary.kind}' adversary has no attacked images of its own; fgsm, n-fgsm, pgd, pgd-radii"
                " and mixed have"
            )

    def task(self, teacher: nn.Module, model: nn.Module, config: TrainingConfig) -> DistillationTask:
        """Returns the task that learns from this teacher."""
        return DistillationTask(model, config, teacher, self.alpha)


class _MixtureBaseline(Settings):
    """A mixture of the pipeline's own pre-trained experts, trained by the recipe in `train`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_removed_keys(cls, value: object) -> object:
        return refuse_removed_keys(value)


class UniformAverage(_MixtureBaseline):
    """The experts with equal weights and no gate, trained together: isolates the contribution of the gate."""

    kind: Literal["uniform"]


class LastLayers(_MixtureBaseline):
    """MoRE (Cheng et al. 2021): the experts are frozen; gate and last layers are trained."""

    kind: Literal["more"]


class HardRouting(_MixtureBaseline):
    """One expert an image, chosen by the gate; gate and experts trained in turn (after AdvMoE, Zhang et al. 2023)."""

    kind: Literal["top1"]


class Synergy(_MixtureBaseline):
    """Synergy-of-Experts (Cui et al. 2022): the expert with the highest confidence is chosen; `temperature` of the
    softmax over confidences, which provides the gradient.
    """

    kind: Literal["soe"]
    temperature: PositiveFloat


MixtureBaseline = UniformAverage | LastLayers | HardRouting | Synergy
Baseline = Annotated[
    SingleNetwork | EqualPassesNetwork | DistilledNetwork | UniformAverage | LastLayers | HardRouting | Synergy,
    Field(discriminator="kind"),
]


def load(key: str) -> Baseline:
    """Loads an entry of params.yaml. Raises UserError when it is missing or invalid."""
    union: Any = Baseline  # not a type for mypy
    baseline: Baseline = load_section(key, union)
    return baseline


def mixture_design(baseline: MixtureBaseline, config: JointConfig) -> MixtureDesign:
    """Returns gate, mixing and task of a mixture baseline."""
    match baseline:
        case UniformAverage():
            return MixtureDesign(UniformGateSettings(kind="uniform"), config.mixing, MixtureTask)
        case LastLayers():
            return MixtureDesign(config.gate, config.mixing, LastLayersTask)
        case HardRouting():
            return MixtureDesign(config.gate, "top1", AlternatingTask)
        case Synergy():
            confidence = ConfidenceSettings(kind="confidence", temperature=baseline.temperature)
            return MixtureDesign(confidence, "top1", SynergyTask)


def paper_mixture(backbone: BackboneSettings, config: JointConfig) -> MixtureArchitecture:
    """Returns the architecture of the mixture."""
    return paper_design(config).architecture(backbone, config.experts)


def match_parameters(kind: BackboneKind, mixture: MixtureArchitecture, facts: DatasetInfo) -> BackboneSettings:
    """Returns the backbone of this kind whose number of parameters is nearest to the mixture's."""
    target = _parameters(mixture, facts)

    def count(width: int) -> int:
        return _parameters(PlainArchitecture(kind="plain", backbone=BackboneSettings(kind=kind, width=width)), facts)

    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return BackboneSettings(kind=kind, width=min(low, high, key=lambda width: abs(count(width) - target)))


def _parameters(architecture: Architecture, facts: DatasetInfo) -> int:
    with torch.device("meta"):
        return count_parameters(classifiers.build(architecture, facts, 0))


def match_flops(
    config: SingleConfig,
    spec: SingleNetwork,
    backbone: BackboneSettings,
    joint: JointConfig,
    prior_flops: int,
    dataset: Dataset,
) -> SingleConfig:
    """Returns the config with as many epochs as take the mixture's operations: the `prior_flops` of its experts plus
    those of its joint phase, on average over the draws of attacks. `backbone`: the experts'.
    """
    mixture = classifiers.build(paper_mixture(backbone, joint), dataset.facts, 0)
    alone = classifiers.build(plain_architecture(spec, backbone), dataset.facts, 0)
    assert isinstance(mixture, MixtureOfExperts)
    target = prior_flops + joint.epochs * _epoch_flops(MixtureTask(mixture, joint), joint.adversary, joint, dataset)
    epochs = round(target / _epoch_flops(task_for(spec, alone, config), spec.adversary, config, dataset))
    return config.model_copy(update={"epochs": max(1, epochs)})


def _epoch_flops(task: HasLoss, adversary: Adversary, config: ValidatedTrainingConfig, dataset: Dataset) -> float:
    """Returns the operations of one epoch, on average over the adversary's draws."""
    train = dataset["train"]
    flops = measure_flops(task, train.first(SAMPLE_SIZE).pixels(), train.first(SAMPLE_SIZE).labels)
    return len(train) * flops_per_training_image(flops, adversary, config.gradients)


def flops_per_training_image(flops: FlopsPerImage, adversary: Adversary, gradients: int) -> float:
    """Returns the operations per image in one epoch: of the attack, on average over the draws, and of `gradients`
    training gradients. `flops`: operations of single passes.
    """
    clean_pass = flops.forward if isinstance(adversary, TradesBatches) else 0  # TRADES compares with the clean output
    return expected_passes(adversary) * (flops.forward + flops.pixels) + clean_pass + gradients * flops.learning


def plain_architecture(spec: SingleNetwork | DistilledNetwork, backbone: BackboneSettings) -> PlainArchitecture:
    """Returns the architecture of a plain network without a matched budget; `backbone` is the experts'."""
    return PlainArchitecture(kind="plain", backbone=BackboneSettings(kind=spec.backbone, width=backbone.width))

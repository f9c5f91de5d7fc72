"""What the mixture is compared with: plain networks of several sizes and budgets, and mixtures of others.

One recipe for all. A plain network is trained as an expert is, for as many epochs as the mixture's two phases have
together, unless it is to match the mixture's work; another mixture starts from the mixture's own pre-trained experts,
and its training takes the place of the joint phase.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from advmoe.core.settings import PositiveFloat, Settings, load_section
from advmoe.data.dataset import Dataset, Facts
from advmoe.models import classifiers
from advmoe.models.classifiers import Architecture, Backbone, BackboneKind, Mixture, NoGate, OwnConfidence, Plain
from advmoe.models.mixture import MixtureOfExperts
from advmoe.training.baselines.distillation import DistillationTask
from advmoe.training.baselines.learners import AlternatingTask, LastLayersTask, SynergyTask
from advmoe.training.batch_attacks import Adversary, CleanBatches, TradesBatches, expected_passes
from advmoe.training.config import TrainingConfig, ValidatedTrainingConfig
from advmoe.training.flops import SAMPLE_SIZE, FlopsPerImage, HasLoss, measure_flops, parameters
from advmoe.training.joint import Design, JointConfig, MixtureTask, paper_design
from advmoe.training.single import NetworkSpec, SingleConfig, task_for

Needs = Literal["prepare", "pretrain", "train/mixture.safetensors"]  # the report writes a card beside the mixture
Beside = Literal["train.epochs", "train"]


class SingleNetwork(NetworkSpec):
    """A plain network. `backbone` at the project's `model.width`, widened if it is to `match` the mixture's
    parameters; trained for longer if it is to match the operations that the whole mixture's training takes.

    `beside` and `needs` say what DVC watches: the number of joint epochs or all of `train`; the data, or the experts.
    """

    kind: Literal["single"]
    backbone: BackboneKind
    match: Literal["nothing", "parameters", "passes"]
    beside: Beside
    needs: Needs

    def model_post_init(self, context: object) -> None:
        """Raises ValueError when what DVC is told to watch is not what training reads."""
        super().model_post_init(context)
        beside: Beside = "train.epochs" if self.match == "nothing" else "train"
        _watched("beside", self.beside, beside, f"match: {self.match}")
        _watched("needs", self.needs, "pretrain" if self.match == "passes" else "prepare", f"match: {self.match}")


class DistilledNetwork(NetworkSpec):
    """A plain network at the project's `model.width` that learns the trained mixture's answers, see
    `advmoe.training.baselines.distillation`; `alpha` in [0, 1] is the share of the attacked images in its loss.
    """

    kind: Literal["distilled"]
    backbone: BackboneKind
    alpha: Annotated[float, Field(ge=0, le=1)]
    beside: Beside
    needs: Needs

    def model_post_init(self, context: object) -> None:
        """Raises ValueError when what DVC is told to watch is not what training reads, or for an adversary that would
        play no part.
        """
        super().model_post_init(context)
        _watched("beside", self.beside, "train.epochs", "a distilled network")
        _watched("needs", self.needs, "train/mixture.safetensors", "a distilled network")
        if isinstance(self.adversary, CleanBatches | TradesBatches):
            raise ValueError(
                f"a '{self.adversary.kind}' adversary has no attacked images of its own; fgsm, n-fgsm, pgd, pgd-radii"
                " and mixed have"
            )

    def learner(self, teacher: nn.Module, model: nn.Module, recipe: TrainingConfig) -> DistillationTask:
        """Who learns from this teacher."""
        return DistillationTask(model, recipe, teacher, self.alpha)


class _MixtureBaseline(Settings):
    """A mixture of the pipeline's own pre-trained experts, trained by the recipe in `train`."""

    reads: Literal["seed", "epsilon"]
    beside: Beside
    needs: Needs

    def model_post_init(self, context: object) -> None:
        """Raises ValueError when what DVC is told to watch is not what training reads."""
        del context
        for key, found, needed in (
            ("reads", self.reads, "epsilon"),
            ("beside", self.beside, "train"),
            ("needs", self.needs, "pretrain"),
        ):
            _watched(key, found, needed, "a mixture")


class UniformAverage(_MixtureBaseline):
    """The experts without a gate, all weighing alike, trained together: what a gate adds is what beats this."""

    kind: Literal["uniform"]


class LastLayers(_MixtureBaseline):
    """MoRE (Cheng et al. 2021): frozen experts; gate and last layers are trained."""

    kind: Literal["more"]


class HardRouting(_MixtureBaseline):
    """One expert an image, chosen by the gate; gate and experts trained in turn (after AdvMoE, Zhang et al. 2023)."""

    kind: Literal["top1"]


class Synergy(_MixtureBaseline):
    """Experts that say how sure they are; the surest answers (Cui et al. 2022). `temperature` of the softmax over
    confidences that gradients go through.
    """

    kind: Literal["soe"]
    temperature: PositiveFloat


MixtureBaseline = UniformAverage | LastLayers | HardRouting | Synergy
Baseline = Annotated[
    SingleNetwork | DistilledNetwork | UniformAverage | LastLayers | HardRouting | Synergy, Field(discriminator="kind")
]


def load(key: str) -> Baseline:
    """An entry of params.yaml. Raises UserError when it is missing or wrong."""
    union: Any = Baseline  # which is no type to mypy
    found: Baseline = load_section(key, union)
    return found


def _watched(key: str, found: str, needed: str, why: str) -> None:
    if found != needed:
        raise ValueError(f"{key} must be {needed} for {why}, or DVC would not see a change, or see one that is none")


def design(comparator: MixtureBaseline, recipe: JointConfig) -> Design:
    """What a mixture of others is made of and how it learns."""
    match comparator:
        case UniformAverage():
            return Design(NoGate(kind="uniform"), recipe.mixing, MixtureTask)
        case LastLayers():
            return Design(recipe.gate, recipe.mixing, LastLayersTask)
        case HardRouting():
            return Design(recipe.gate, "top1", AlternatingTask)
        case Synergy():
            confidence = OwnConfidence(kind="confidence", temperature=comparator.temperature)
            return Design(confidence, "top1", SynergyTask)


def paper_mixture(backbone: Backbone, recipe: JointConfig) -> Mixture:
    """The architecture to match."""
    return paper_design(recipe).architecture(backbone, recipe.experts)


def match_parameters(kind: BackboneKind, mixture: Mixture, facts: Facts) -> Backbone:
    """The backbone whose number of parameters comes nearest to the mixture's."""
    target = _parameters(mixture, facts)

    def count(width: int) -> int:
        return _parameters(Plain(kind="plain", backbone=Backbone(kind=kind, width=width)), facts)

    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return Backbone(kind=kind, width=min(low, high, key=lambda width: abs(count(width) - target)))


def _parameters(architecture: Architecture, facts: Facts) -> int:
    with torch.device("meta"):
        return parameters(classifiers.build(architecture, facts, 0))


def match_flops(
    recipe: SingleConfig, student: SingleNetwork, backbone: Backbone, joint: JointConfig, spent: int, dataset: Dataset
) -> SingleConfig:
    """The recipe for as many epochs as take the mixture's operations: those `spent` on its experts, which are counted,
    and those that its joint phase takes on average over its draws. `backbone`: the experts'.
    """
    mixture = classifiers.build(paper_mixture(backbone, joint), dataset.facts, 0)
    alone = classifiers.build(plain(student, backbone), dataset.facts, 0)
    assert isinstance(mixture, MixtureOfExperts)
    target = spent + joint.epochs * _epoch(MixtureTask(mixture, joint), joint.adversary, joint, dataset)
    epochs = round(target / _epoch(task_for(student, alone, recipe), student.adversary, recipe, dataset))
    return recipe.model_copy(update={"epochs": max(1, epochs)})


def _epoch(learner: HasLoss, adversary: Adversary, recipe: ValidatedTrainingConfig, dataset: Dataset) -> float:
    """Operations of one epoch, on average over the adversary's draws."""
    train = dataset["train"]
    each = measure_flops(learner, train.first(SAMPLE_SIZE).pixels(), train.first(SAMPLE_SIZE).labels)
    return len(train) * per_image(each, adversary, recipe.gradients)


def per_image(each: FlopsPerImage, adversary: Adversary, gradients: int) -> float:
    """Operations that an image takes in one epoch: to attack it, on average over the draws, and to learn from it so
    many times.
    """
    look = each.forward if isinstance(adversary, TradesBatches) else 0  # TRADES climbs away from the clean answer
    return expected_passes(adversary) * (each.forward + each.pixels) + look + gradients * each.learning


def plain(student: SingleNetwork | DistilledNetwork, backbone: Backbone) -> Plain:
    """The architecture of a plain network that matches nothing; `backbone` is the experts'."""
    return Plain(kind="plain", backbone=Backbone(kind=student.backbone, width=backbone.width))

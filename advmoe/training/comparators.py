"""What the mixture is compared with: plain networks of several sizes and budgets, and mixtures of others.

One recipe for all. A plain network is trained as an expert is, for as many epochs as the mixture's two phases have
together, unless it is to match the mixture's work; another mixture starts from the mixture's own pre-trained experts,
and its training takes the place of the joint phase.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from advmoe import classifiers
from advmoe.classifiers import Architecture, Backbone, BackboneKind, Mixture, NoGate, OwnConfidence, Plain
from advmoe.data.dataset import Dataset, Facts
from advmoe.models.moe import MixtureOfExperts
from advmoe.params import PositiveFloat, Settings, load_section
from advmoe.training.adversary import Adversary, CleanBatches, TradesBatches, expected_passes
from advmoe.training.cost import SAMPLE, Learns, Rates, parameters, rates
from advmoe.training.distilled import DistilledLearner
from advmoe.training.joint import Design, JointRecipe, MixtureLearner, the_papers
from advmoe.training.recipe import Learning, Recipe
from advmoe.training.rivals import AlternatingLearner, LastLayersLearner, SynergyLearner
from advmoe.training.single import SingleRecipe, Student, learner_of

Needs = Literal["prepare", "pretrain", "train/mixture.safetensors"]  # the report writes a card beside the mixture
Beside = Literal["train.epochs", "train"]


class SingleNetwork(Student):
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


class Distilled(Student):
    """A plain network at the project's `model.width` that learns the trained mixture's answers, see
    `advmoe.training.distilled`; `alpha` in [0, 1] is the share of the attacked images in its loss.
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

    def learner(self, teacher: nn.Module, model: nn.Module, recipe: Learning) -> DistilledLearner:
        """Who learns from this teacher."""
        return DistilledLearner(model, recipe, teacher, self.alpha)


class _OfExperts(Settings):
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


class UniformAverage(_OfExperts):
    """The experts without a gate, all weighing alike, trained together: what a gate adds is what beats this."""

    kind: Literal["uniform"]


class LastLayers(_OfExperts):
    """MoRE (Cheng et al. 2021): frozen experts; gate and last layers are trained."""

    kind: Literal["more"]


class HardRouting(_OfExperts):
    """One expert an image, chosen by the gate; gate and experts trained in turn (after AdvMoE, Zhang et al. 2023)."""

    kind: Literal["top1"]


class Synergy(_OfExperts):
    """Experts that say how sure they are; the surest answers (Cui et al. 2022). `temperature` of the softmax over
    confidences that gradients go through.
    """

    kind: Literal["soe"]
    temperature: PositiveFloat


OfExperts = UniformAverage | LastLayers | HardRouting | Synergy
Comparator = Annotated[
    SingleNetwork | Distilled | UniformAverage | LastLayers | HardRouting | Synergy, Field(discriminator="kind")
]


def load(key: str) -> Comparator:
    """An entry of params.yaml. Raises UserError when it is missing or wrong."""
    union: Any = Comparator  # which is no type to mypy
    found: Comparator = load_section(key, union)
    return found


def _watched(key: str, found: str, needed: str, why: str) -> None:
    if found != needed:
        raise ValueError(f"{key} must be {needed} for {why}, or DVC would not see a change, or see one that is none")


def design(comparator: OfExperts, recipe: JointRecipe) -> Design:
    """What a mixture of others is made of and how it learns."""
    match comparator:
        case UniformAverage():
            return Design(NoGate(kind="uniform"), recipe.mixing, MixtureLearner)
        case LastLayers():
            return Design(recipe.gate, recipe.mixing, LastLayersLearner)
        case HardRouting():
            return Design(recipe.gate, "top1", AlternatingLearner)
        case Synergy():
            confidence = OwnConfidence(kind="confidence", temperature=comparator.temperature)
            return Design(confidence, "top1", SynergyLearner)


def the_mixture(backbone: Backbone, recipe: JointRecipe) -> Mixture:
    """The architecture to match."""
    return the_papers(recipe).architecture(backbone, recipe.experts)


def widened(kind: BackboneKind, mixture: Mixture, facts: Facts) -> Backbone:
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


def lengthened(
    recipe: SingleRecipe, student: SingleNetwork, backbone: Backbone, joint: JointRecipe, spent: int, dataset: Dataset
) -> SingleRecipe:
    """The recipe for as many epochs as take the mixture's operations: those `spent` on its experts, which are counted,
    and those that its joint phase takes on average over its draws. `backbone`: the experts'.
    """
    mixture = classifiers.build(the_mixture(backbone, joint), dataset.facts, 0)
    alone = classifiers.build(plain(student, backbone), dataset.facts, 0)
    assert isinstance(mixture, MixtureOfExperts)
    target = spent + joint.epochs * _epoch(MixtureLearner(mixture, joint), joint.adversary, joint, dataset)
    epochs = round(target / _epoch(learner_of(student, alone, recipe), student.adversary, recipe, dataset))
    return recipe.model_copy(update={"epochs": max(1, epochs)})


def _epoch(learner: Learns, adversary: Adversary, recipe: Recipe, dataset: Dataset) -> float:
    """Operations of one epoch, on average over the adversary's draws."""
    train = dataset["train"]
    each = rates(learner, train.first(SAMPLE).pixels(), train.first(SAMPLE).labels)
    return len(train) * per_image(each, adversary, recipe.gradients)


def per_image(each: Rates, adversary: Adversary, gradients: int) -> float:
    """Operations that an image takes in one epoch: to attack it, on average over the draws, and to learn from it so
    many times.
    """
    look = each.forward if isinstance(adversary, TradesBatches) else 0  # TRADES climbs away from the clean answer
    return expected_passes(adversary) * (each.forward + each.pixels) + look + gradients * each.learning


def plain(student: SingleNetwork | Distilled, backbone: Backbone) -> Plain:
    """The architecture of a plain network that matches nothing; `backbone` is the experts'."""
    return Plain(kind="plain", backbone=Backbone(kind=student.backbone, width=backbone.width))

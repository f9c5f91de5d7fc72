"""Metrics of poisoning: accuracies, attack success rates and detection rates, with their intervals.

The attack success rate is the share of triggered test images of other classes that are classified as the target;
images of the target class are excluded. The same rate of the clean twin is given for comparison, because a collapsed
network that always predicts the target has a rate of 100 % without any poison.

Shapes: N test images, C channel, H/W pixels, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.core.errors import UserError
from advmoe.data.dataset import Split
from advmoe.models import inference
from advmoe.models.gate_statistics import entropy, gate_weights, total_variation
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import derive_seed
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import PairedDifference, compare_paired
from advmoe.threats.poisoning.poisoned_set import PoisonedSet, Trigger

DIGITS = 6
BATCH_SIZE = 200  # images of a forward pass


@dataclass(frozen=True)
class EvaluationInputs:
    """Test images, and the attack that measures robust accuracy; the same for victims and clean twins."""

    split: Split
    attack: Pgd
    epsilon: float
    seed: int
    precision: inference.Precision


@dataclass(frozen=True)
class Predictions:
    """Predicted classes (N,) of the clean test images, and whether they are classified correctly under PGD (N,)."""

    predicted: Tensor
    robust: Tensor


def predict_clean_and_robust(model: nn.Module, inputs: EvaluationInputs) -> Predictions:
    """Returns a model's predictions, in eval mode, on the test images without trigger, clean and under PGD."""
    device = next(model.parameters()).device
    images, labels = inputs.split.pixels().to(device), inputs.split.labels.to(device)
    predicted = inference.predict(model, images, BATCH_SIZE).argmax(1)
    adversarial = engine.attack_dataset(
        model,
        images,
        labels,
        predicted == labels,
        partial(pgd, settings=inputs.attack),
        ball=LInf(inputs.epsilon),
        seed=derive_seed(inputs.seed, "poison"),
        purpose=inputs.attack.kind,
        precision=inputs.precision,
        batch_size=BATCH_SIZE,
    )
    robust = (predicted == labels) & (inference.predict(model, adversarial, BATCH_SIZE).argmax(1) == labels)
    return Predictions(predicted.cpu(), robust.cpu())


def predict_classes(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Returns a model's predicted classes (N,) of uint8 images."""
    device = next(model.parameters()).device
    return inference.predict(model, images_NCHW.to(device).float() / 255, BATCH_SIZE).argmax(1).cpu()


@dataclass(frozen=True)
class VictimTwinPair:
    """A victim and its clean twin with their predictions."""

    victim: nn.Module
    twin: nn.Module
    predictions: Predictions
    twin_predictions: Predictions


def compute_metrics(
    pair: VictimTwinPair, poisoned: PoisonedSet, inputs: EvaluationInputs, experts: Sequence[str]
) -> dict[str, Proportion | PairedDifference | Any]:
    """Returns all metrics of this attack by name.

    `experts`: names of a mixture's experts, empty for plain networks. Raises UserError when the test images that the
    attack succeeds on are missing.
    """
    labels = inputs.split.labels
    correct, twin_correct = pair.predictions.predicted == labels, pair.twin_predictions.predicted == labels
    metrics: dict[str, Any] = {
        "clean_acc": Proportion.from_mask(correct),
        "d_clean_acc": compare_paired(correct, twin_correct, inputs.seed),
        "robust_acc": Proportion.from_mask(pair.predictions.robust),
        "d_robust_acc": compare_paired(pair.predictions.robust, pair.twin_predictions.robust, inputs.seed),
    }
    goal = poisoned.goal
    if poisoned.trigger is not None:
        assert goal.target is not None
        metrics |= _backdoor_metrics(pair, poisoned.trigger, goal.target, inputs)
        if isinstance(pair.victim, MixtureOfExperts):
            metrics |= _mixture_metrics(pair.victim, poisoned.trigger, goal.target, inputs.split, experts)
    elif poisoned.target_image is not None:
        assert goal.target is not None
        image = poisoned.target_image[None]
        metrics["success"] = Proportion.from_mask(predict_classes(pair.victim, image).eq(goal.target))
        metrics["success_clean_twin"] = Proportion.from_mask(predict_classes(pair.twin, image).eq(goal.target))
    elif goal.source is not None:
        assert goal.target is not None
        metrics |= _targeted_flip_metrics(pair, goal.source, goal.target, inputs)
    return metrics


def attack_successes(predicted_N: Tensor, labels_N: Tensor, target: int) -> Tensor:
    """Returns for every image of another class whether it is classified as the target (n,), n <= N.

    Raises UserError when there is no such image.
    """
    others = labels_N != target
    if not others.any():
        raise UserError(f"all test images are of the target class {target}, so no attack can succeed on them")
    return predicted_N[others] == target


def trigger_recoveries(predicted_N: Tensor, labels_N: Tensor, target: int) -> Tensor:
    """Returns for every image of another class whether it is still classified correctly (n,), n <= N."""
    others = labels_N != target
    return predicted_N[others] == labels_N[others]


def _backdoor_metrics(
    pair: VictimTwinPair, trigger: Trigger, target: int, inputs: EvaluationInputs
) -> dict[str, Proportion | PairedDifference]:
    labels, triggered = inputs.split.labels, trigger.stamp(inputs.split.images)
    predicted, twin_predicted = predict_classes(pair.victim, triggered), predict_classes(pair.twin, triggered)
    hits, twin_hits = (attack_successes(each, labels, target) for each in (predicted, twin_predicted))
    return {
        "asr": Proportion.from_mask(hits),
        "asr_clean_twin": Proportion.from_mask(twin_hits),
        "d_asr": compare_paired(hits, twin_hits, inputs.seed),
        "trigger_recovery_acc": Proportion.from_mask(trigger_recoveries(predicted, labels, target)),
    }


def _targeted_flip_metrics(
    pair: VictimTwinPair, source: int, target: int, inputs: EvaluationInputs
) -> dict[str, Proportion | PairedDifference]:
    """P(f = target | y = source) of a targeted label flip."""
    of_source = inputs.split.labels == source
    if not of_source.any():
        raise UserError(f"there is no test image of class {source}, so label flips from it cannot be measured")
    hits, twin_hits = (each.predicted[of_source].eq(target) for each in (pair.predictions, pair.twin_predictions))
    return {
        "source_to_target": Proportion.from_mask(hits),
        "source_to_target_clean_twin": Proportion.from_mask(twin_hits),
        "d_source_to_target": compare_paired(hits, twin_hits, inputs.seed),
    }


def _mixture_metrics(
    mixture: MixtureOfExperts, trigger: Trigger, target: int, split: Split, experts: Sequence[str]
) -> dict[str, Any]:
    """Success rate of each expert alone, and the effect of the trigger on the gate."""
    triggered = trigger.stamp(split.images)
    metrics: dict[str, Any] = {
        f"asr_{name}": Proportion.from_mask(attack_successes(predict_classes(expert, triggered), split.labels, target))
        for name, expert in zip(experts, mixture.experts, strict=True)
    }
    device = next(mixture.parameters()).device
    clean_NE, triggered_NE = (
        gate_weights(mixture, images.to(device).float() / 255) for images in (split.images, triggered)
    )
    metrics["gate_entropy"] = round(float(entropy(clean_NE)), DIGITS)
    metrics["gate_entropy_triggered"] = round(float(entropy(triggered_NE)), DIGITS)
    metrics["gate_shift"] = round(float(total_variation(clean_NE, triggered_NE)), DIGITS)
    return metrics


def detection_rates(flagged_N: Tensor, is_poison_N: Tensor) -> dict[str, Any]:
    """Returns true and false positive rate of a detector (`tpr`, `fpr`), from masks over the training images (N,).

    `fpr` is missing when every image is poisoned.
    """
    rates: dict[str, Any] = {"tpr": Proportion.from_mask(flagged_N[is_poison_N])}
    if not is_poison_N.all():
        rates["fpr"] = Proportion.from_mask(flagged_N[~is_poison_N])
    return rates

"""What poison did: exactly the numbers of the protocol, each with its denominator and its interval.

The attack success rate counts test images of other classes that become the target under the trigger; the target class
itself is in neither count. Beside it stands the same rate of the clean twin, because a collapsed network that answers
the target to everything has 100 % of both.

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
from advmoe.models.gate_statistics import entropy, gate_weights, shift
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import derive_seed
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import PairedDifference, compare
from advmoe.threats.poisoning.poisoned_set import Poisoned, Trigger

DIGITS = 6
BATCH = 200  # images of a forward pass


@dataclass(frozen=True)
class Exam:
    """The test images that victims and twins are asked about, and the attack behind robust accuracy."""

    split: Split
    robust: Pgd
    epsilon: float
    seed: int
    precision: inference.Precision


@dataclass(frozen=True)
class Answers:
    """A model's classes (N,) on the clean test images, and whether it is right about them under PGD (N,)."""

    predicted: Tensor
    robust: Tensor


def examine(model: nn.Module, exam: Exam) -> Answers:
    """Ask a model, in eval mode, about the untriggered images, clean and attacked."""
    place = next(model.parameters()).device
    images, labels = exam.split.pixels().to(place), exam.split.labels.to(place)
    predicted = inference.predict(model, images, BATCH).argmax(1)
    adversarial = engine.attack_dataset(
        model,
        images,
        labels,
        predicted == labels,
        partial(pgd, settings=exam.robust),
        ball=LInf(exam.epsilon),
        seed=derive_seed(exam.seed, "poison"),
        purpose=exam.robust.kind,
        precision=exam.precision,
        batch_size=BATCH,
    )
    robust = (predicted == labels) & (inference.predict(model, adversarial, BATCH).argmax(1) == labels)
    return Answers(predicted.cpu(), robust.cpu())


def classes_of(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """A model's classes (N,) on uint8 images."""
    place = next(model.parameters()).device
    return inference.predict(model, images_NCHW.to(place).float() / 255, BATCH).argmax(1).cpu()


@dataclass(frozen=True)
class Pair:
    """A victim and its clean twin, with their answers to the exam."""

    victim: nn.Module
    twin: nn.Module
    answers: Answers
    twin_answers: Answers


def numbers(
    pair: Pair, poisoned: Poisoned, exam: Exam, experts: Sequence[str]
) -> dict[str, Share | PairedDifference | Any]:
    """All metrics that this attack has, by name. `experts`: names of a mixture's experts, empty for plain networks."""
    labels = exam.split.labels
    right, twin_right = pair.answers.predicted == labels, pair.twin_answers.predicted == labels
    found: dict[str, Any] = {
        "clean_acc": Share.of(right),
        "d_clean_acc": compare(right, twin_right, exam.seed),
        "robust_acc": Share.of(pair.answers.robust),
        "d_robust_acc": compare(pair.answers.robust, pair.twin_answers.robust, exam.seed),
    }
    goal = poisoned.goal
    if poisoned.trigger is not None:
        assert goal.target is not None
        found |= _backdoor(pair, poisoned.trigger, goal.target, exam)
        if isinstance(pair.victim, MixtureOfExperts):
            found |= _inside(pair.victim, poisoned.trigger, goal.target, exam.split, experts)
    elif poisoned.wanted_image is not None:
        assert goal.target is not None
        wanted = poisoned.wanted_image[None]
        found["success"] = Share.of(classes_of(pair.victim, wanted).eq(goal.target))
        found["success_clean_twin"] = Share.of(classes_of(pair.twin, wanted).eq(goal.target))
    elif goal.source is not None:
        assert goal.target is not None
        found |= _confused(pair, goal.source, goal.target, exam)
    return found


def successes(predicted_N: Tensor, labels_N: Tensor, target: int) -> Tensor:
    """For every image of another class, whether it becomes the target (n,). Raises UserError when there is none."""
    others = labels_N != target
    if not others.any():
        raise UserError(f"all test images are of the target class {target}, so no attack can succeed on them")
    return predicted_N[others] == target


def recovered(predicted_N: Tensor, labels_N: Tensor, target: int) -> Tensor:
    """For every image of another class, whether it is given its true class all the same (n,)."""
    others = labels_N != target
    return predicted_N[others] == labels_N[others]


def _backdoor(pair: Pair, trigger: Trigger, target: int, exam: Exam) -> dict[str, Share | PairedDifference]:
    labels, triggered = exam.split.labels, trigger.stamp(exam.split.images)
    predicted, twin_predicted = classes_of(pair.victim, triggered), classes_of(pair.twin, triggered)
    hits, twin_hits = (successes(each, labels, target) for each in (predicted, twin_predicted))
    return {
        "asr": Share.of(hits),
        "asr_clean_twin": Share.of(twin_hits),
        "d_asr": compare(hits, twin_hits, exam.seed),
        "trigger_recovery_acc": Share.of(recovered(predicted, labels, target)),
    }


def _confused(pair: Pair, source: int, target: int, exam: Exam) -> dict[str, Share | PairedDifference]:
    """P(f = target | y = source) of a targeted flip."""
    of_source = exam.split.labels == source
    if not of_source.any():
        raise UserError(f"there is no test image of class {source}, so nothing can be said of flips from it")
    hits, twin_hits = (each.predicted[of_source].eq(target) for each in (pair.answers, pair.twin_answers))
    return {
        "source_to_target": Share.of(hits),
        "source_to_target_clean_twin": Share.of(twin_hits),
        "d_source_to_target": compare(hits, twin_hits, exam.seed),
    }


def _inside(
    mixture: MixtureOfExperts, trigger: Trigger, target: int, split: Split, experts: Sequence[str]
) -> dict[str, Any]:
    """What the trigger does to each expert, and to the gate."""
    triggered = trigger.stamp(split.images)
    found: dict[str, Any] = {
        f"asr_{name}": Share.of(successes(classes_of(expert, triggered), split.labels, target))
        for name, expert in zip(experts, mixture.experts, strict=True)
    }
    place = next(mixture.parameters()).device
    clean_NE, triggered_NE = (gate_weights(mixture, each.to(place).float() / 255) for each in (split.images, triggered))
    found["gate_entropy"] = round(float(entropy(clean_NE)), DIGITS)
    found["gate_entropy_triggered"] = round(float(entropy(triggered_NE)), DIGITS)
    found["gate_shift"] = round(float(shift(clean_NE, triggered_NE)), DIGITS)
    return found


def detected(flagged_N: Tensor, is_poison_N: Tensor) -> dict[str, Any]:
    """How well a detector told poison from clean training images (N,): true and false positive rate."""
    found: dict[str, Any] = {"tpr": Share.of(flagged_N[is_poison_N])}
    if not is_poison_N.all():
        found["fpr"] = Share.of(flagged_N[~is_poison_N])
    return found

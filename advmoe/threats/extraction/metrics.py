"""Metrics of extraction: accuracy, fidelity and transferability of surrogates, with intervals.

Task accuracy on an easy data set is weak evidence. The relevant number is the difference to the control, a network
trained on the attacker's own labelled images without any query.

Shapes: N images, C channel, H/W pixels, K classes.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, round_to_uint8
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.core.settings import PIXEL_LEVELS
from advmoe.data.dataset import Split
from advmoe.models import inference
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import derive_seed, device, generator
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import compare_paired
from advmoe.threats.extraction.victims import Victim
from advmoe.threats.results import DIGITS

BATCH_SIZE = 200


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs that victim and surrogates are compared on: test images, uniform noise (M, C, H, W) uint8, and PGD."""

    split: Split
    noise: Tensor
    attack: Pgd
    epsilon: float
    seed: int
    precision: inference.Precision

    @property
    def pixels(self) -> Tensor:
        """The test images (N, C, H, W) in [0, 1], on the device."""
        return self.split.pixels().to(device())

    @property
    def labels(self) -> Tensor:
        """Their labels (N,), on the device."""
        return self.split.labels.to(device())


@dataclass(frozen=True)
class VictimAnswers:
    """The victim's outputs: probabilities (N, K) on the test images; classes on noise (M,), on test images with random
    signs of size epsilon (N,), and on PGD examples `attacked` (N, C, H, W) crafted on it (None for a query function).
    """

    probabilities: Tensor
    on_noise: Tensor
    on_signs: Tensor
    attacked: Tensor | None
    on_attacked: Tensor | None

    @property
    def predicted(self) -> Tensor:
        """The predicted classes (N,) of the test images."""
        return self.probabilities.argmax(1)


def victim_answers(victim: Victim, inputs: EvaluationInputs) -> VictimAnswers:
    """Returns the victim's outputs on all inputs. These evaluations do not count as the attacker's queries."""
    attacked = None if victim.model is None else pgd_examples(victim.model, inputs)
    return VictimAnswers(
        probabilities=victim.query(inputs.split.images),
        on_noise=victim.query(inputs.noise).argmax(1),
        on_signs=victim_predictions(victim, _random_sign_examples(inputs), inputs),
        attacked=attacked,
        on_attacked=None if attacked is None else victim_predictions(victim, attacked, inputs),
    )


def victim_predictions(victim: Victim, pixels_NCHW: Tensor, inputs: EvaluationInputs) -> Tensor:
    """Returns the victim's classes (N,) on perturbed test images; an endpoint receives them rounded to uint8."""
    if victim.model is None:
        return victim.query(round_to_uint8(pixels_NCHW.cpu(), inputs.split.images, inputs.epsilon)).argmax(1)
    return predict_classes(victim.model, pixels_NCHW)


def predict_classes(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    """Returns a network's classes (N,) on the CPU."""
    return inference.predict(model, pixels_NCHW.to(device()), BATCH_SIZE).argmax(1).cpu()


def pgd_examples(model: nn.Module, inputs: EvaluationInputs) -> Tensor:
    """Returns PGD examples on `model` (N, C, H, W); an image stops at its first misclassified point."""
    return engine.attack_dataset(
        model,
        inputs.pixels,
        inputs.labels,
        torch.ones(len(inputs.split), dtype=torch.bool, device=device()),
        partial(pgd, settings=inputs.attack),
        ball=LInf(inputs.epsilon),
        seed=derive_seed(inputs.seed, "extract"),
        purpose=inputs.attack.kind,
        precision=inputs.precision,
        batch_size=BATCH_SIZE,
    )


def transfer_examples(model: nn.Module, inputs: EvaluationInputs) -> Tensor:
    """Returns PGD examples on `model` after all steps (N, C, H, W), for transfer."""
    return engine.attack_without_early_stop(
        model,
        inputs.pixels,
        inputs.labels,
        partial(pgd, settings=inputs.attack),
        ball=LInf(inputs.epsilon),
        seed=derive_seed(inputs.seed, "extract"),
        purpose="transfer",
        precision=inputs.precision,
        batch_size=BATCH_SIZE,
    )


def _random_sign_examples(inputs: EvaluationInputs) -> Tensor:
    """Returns the test images with random signs of size epsilon (N, C, H, W): the untargeted noise baseline."""
    images = inputs.split.pixels()
    signs = torch.randint(0, 2, images.shape, generator=generator(inputs.seed, "extract", "signs")) * 2 - 1
    return LInf(inputs.epsilon).project(images + inputs.epsilon * signs, images)


@dataclass(frozen=True)
class SurrogateAnswers:
    """A surrogate's outputs: log-probabilities (N, K), classes on noise (M,) and on the victim's PGD examples (N,),
    whether it is correct on its own PGD examples (N,), and the victim's classes on transfer examples (N,).
    """

    log_probs: Tensor
    on_noise: Tensor
    on_attacked: Tensor | None
    robust: Tensor
    transferred: Tensor

    @property
    def predicted(self) -> Tensor:
        """The predicted classes (N,) of the test images."""
        return self.log_probs.argmax(1)


def surrogate_answers(
    surrogate: nn.Module, victim: Victim, victim_outputs: VictimAnswers, inputs: EvaluationInputs
) -> SurrogateAnswers:
    """Returns a surrogate's outputs on all inputs, and the victim's classes on examples crafted on the surrogate."""
    surrogate = surrogate.to(device())
    logits = inference.predict(surrogate, inputs.pixels, BATCH_SIZE).cpu()
    return SurrogateAnswers(
        log_probs=functional.log_softmax(logits.double(), dim=1),
        on_noise=predict_classes(surrogate, inputs.noise.float() / PIXEL_LEVELS),
        on_attacked=None if victim_outputs.attacked is None else predict_classes(surrogate, victim_outputs.attacked),
        robust=predict_classes(surrogate, pgd_examples(surrogate, inputs)) == inputs.split.labels,
        transferred=victim_predictions(victim, transfer_examples(surrogate, inputs), inputs),
    )


AnswersT = TypeVar("AnswersT", VictimAnswers, SurrogateAnswers)


def to_checkpoint(answers: VictimAnswers | SurrogateAnswers) -> Checkpoint:
    """Returns answers as a checkpoint."""
    return Checkpoint({name: tensor for name, tensor in vars(answers).items() if tensor is not None}, {})


def from_checkpoint(checkpoint: Checkpoint, answers_type: type[AnswersT]) -> AnswersT:
    """Returns the answers of `answers_type` that `to_checkpoint` stored."""
    # fields that are None for a victim without a network are not stored
    answers: dict[str, Any] = {field.name: None for field in fields(answers_type) if str(field.type).endswith("None")}
    answers.update(checkpoint.tensors)
    return answers_type(**answers)


def compute_metrics(
    surrogate: SurrogateAnswers, control: SurrogateAnswers | None, victim: VictimAnswers, inputs: EvaluationInputs
) -> dict[str, Any]:
    """Returns all metrics of one surrogate; with a `control` also the paired differences to it (`d_...`)."""
    labels, predicted = inputs.split.labels, surrogate.predicted
    correct, agrees = victim.predicted == labels, predicted == victim.predicted
    metrics: dict[str, Any] = {
        "task_acc": Proportion.from_mask(predicted == labels),
        "acc_ratio": round(float((predicted == labels).sum() / correct.sum().clamp_min(1)), DIGITS),
        "fidelity": Proportion.from_mask(agrees),
        "noise_fidelity": Proportion.from_mask(surrogate.on_noise == victim.on_noise),
        "kl": round(float(_kl_divergence(victim.probabilities, surrogate.log_probs)), DIGITS),
        "surrogate_robust_acc": Proportion.from_mask(surrogate.robust),
        "victim_acc_under_transfer": Proportion.from_mask(surrogate.transferred == labels),
    }
    if surrogate.on_attacked is not None and victim.on_attacked is not None:
        metrics["robust_fidelity"] = Proportion.from_mask(surrogate.on_attacked == victim.on_attacked)
    if not correct.all():
        metrics["fidelity_on_victim_errors"] = Proportion.from_mask(agrees[~correct])
    if correct.any():  # images that the victim misclassifies anyway do not count as successes
        success = (surrogate.transferred != labels)[correct]
        metrics["transfer_asr"] = Proportion.from_mask(success)
        metrics["random_sign_asr"] = Proportion.from_mask((victim.on_signs != labels)[correct])
        if victim.on_attacked is not None:
            metrics["white_box_asr"] = Proportion.from_mask((victim.on_attacked != labels)[correct])
        if control is not None:
            metrics["d_transfer_asr"] = compare_paired(success, (control.transferred != labels)[correct], inputs.seed)
    if control is not None:
        metrics["d_fidelity"] = compare_paired(agrees, control.predicted == victim.predicted, inputs.seed)
        metrics["d_task_acc"] = compare_paired(predicted == labels, control.predicted == labels, inputs.seed)
    return metrics


def _kl_divergence(victim_NK: Tensor, log_probs_NK: Tensor) -> Tensor:
    """Returns the mean KL(victim || surrogate) in nats."""
    return functional.kl_div(log_probs_NK, victim_NK.double(), reduction="batchmean")


def benign_user_cost(victim_NK: Tensor, answers_NK: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Returns an answer mode's cost for a benign user: the accuracy, and the distance of the answered probabilities.

    The distance is the mean total variation between the victim's probabilities and its answers (N, K).
    """
    distance = (victim_NK - answers_NK).abs().sum(dim=1) / 2
    return {
        "honest_acc": Proportion.from_mask(answers_NK.argmax(1) == labels_N),
        "honest_distance": round(float(distance.mean()), DIGITS),
    }

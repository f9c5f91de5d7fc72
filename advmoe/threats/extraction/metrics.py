"""What a surrogate stole: exactly the numbers of the protocol, with intervals, beside what no query buys.

Task accuracy on an easy set proves little. What counts is how far a surrogate gets beyond the control, a network
trained on the attacker's own labelled images, for which the victim was never asked.

Shapes: N images, C channel, H/W pixels, K classes.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf, to_levels
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.core.settings import PIXEL_LEVELS
from advmoe.data.dataset import Split
from advmoe.models import inference
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import derive_seed, device, generator
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import compare
from advmoe.threats.extraction.victims import Victim
from advmoe.threats.results import DIGITS

BATCH = 200


@dataclass(frozen=True)
class Exam:
    """What victim and surrogates are compared on: test images, uniform noise (M, C, H, W) uint8, and PGD."""

    split: Split
    noise: Tensor
    attack: Pgd
    epsilon: float
    seed: int
    precision: inference.Precision

    @property
    def pixels(self) -> Tensor:
        """The test images as numbers, on the device."""
        return self.split.pixels().to(device())

    @property
    def labels(self) -> Tensor:
        """Theirs, on the device."""
        return self.split.labels.to(device())


@dataclass(frozen=True)
class VictimAnswers:
    """The victim's side, computed once: probabilities (N, K) on the test images; classes on noise (M,), on random signs
    of size epsilon (N,), and, where there is a network to differentiate, on PGD images (N, C, H, W) crafted on it.
    """

    probabilities: Tensor
    on_noise: Tensor
    on_signs: Tensor
    attacked: Tensor | None
    on_attacked: Tensor | None

    @property
    def predicted(self) -> Tensor:
        """The victim's classes (N,)."""
        return self.probabilities.argmax(1)


def victim_answers(victim: Victim, exam: Exam) -> VictimAnswers:
    """Ask the victim everything that surrogates will be compared with. None of this counts as the attacker's query."""
    attacked = None if victim.model is None else broken(victim.model, exam)
    return VictimAnswers(
        probabilities=victim.ask(exam.split.images),
        on_noise=victim.ask(exam.noise).argmax(1),
        on_signs=shown(victim, _signs(exam), exam),
        attacked=attacked,
        on_attacked=None if attacked is None else shown(victim, attacked, exam),
    )


def shown(victim: Victim, pixels_NCHW: Tensor, exam: Exam) -> Tensor:
    """The victim's classes (N,) on points around the test images; an endpoint is sent whole levels."""
    if victim.model is None:
        return victim.ask(to_levels(pixels_NCHW.cpu(), exam.split.images, exam.epsilon)).argmax(1)
    return classes(victim.model, pixels_NCHW)


def classes(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    """A network's classes (N,)."""
    return inference.predict(model, pixels_NCHW.to(device()), BATCH).argmax(1).cpu()


def broken(model: nn.Module, exam: Exam) -> Tensor:
    """The test images under PGD on `model` (N, C, H, W): an image leaves at the first point that the model errs on."""
    return engine.attack_dataset(
        model,
        exam.pixels,
        exam.labels,
        torch.ones(len(exam.split), dtype=torch.bool, device=device()),
        partial(pgd, settings=exam.attack),
        ball=LInf(exam.epsilon),
        seed=derive_seed(exam.seed, "extract"),
        purpose=exam.attack.kind,
        precision=exam.precision,
        batch_size=BATCH,
    )


def to_transfer(model: nn.Module, exam: Exam) -> Tensor:
    """The test images after every step of PGD on `model` (N, C, H, W)."""
    return engine.attack_without_early_stop(
        model,
        exam.pixels,
        exam.labels,
        partial(pgd, settings=exam.attack),
        ball=LInf(exam.epsilon),
        seed=derive_seed(exam.seed, "extract"),
        purpose="transfer",
        precision=exam.precision,
        batch_size=BATCH,
    )


def _signs(exam: Exam) -> Tensor:
    """The test images with random signs of size epsilon: what a change of that size does without any aim."""
    images = exam.split.pixels()
    signs = torch.randint(0, 2, images.shape, generator=generator(exam.seed, "extract", "signs")) * 2 - 1
    return LInf(exam.epsilon).project(images + exam.epsilon * signs, images)


@dataclass(frozen=True)
class SurrogateAnswers:
    """A surrogate's side: log-probabilities (N, K), classes on noise (M,) and on the victim's PGD images (N,), whether
    it is right about its own (N,), and the victim's classes on images crafted on the surrogate (N,).
    """

    log_probs: Tensor
    on_noise: Tensor
    on_attacked: Tensor | None
    robust: Tensor
    transferred: Tensor

    @property
    def predicted(self) -> Tensor:
        """Its classes (N,)."""
        return self.log_probs.argmax(1)


def examine(surrogate: nn.Module, victim: Victim, known: VictimAnswers, exam: Exam) -> SurrogateAnswers:
    """Ask a surrogate what the victim was asked, and the victim about images crafted on the surrogate."""
    surrogate = surrogate.to(device())
    logits = inference.predict(surrogate, exam.pixels, BATCH).cpu()
    return SurrogateAnswers(
        log_probs=functional.log_softmax(logits.double(), dim=1),
        on_noise=classes(surrogate, exam.noise.float() / PIXEL_LEVELS),
        on_attacked=None if known.attacked is None else classes(surrogate, known.attacked),
        robust=classes(surrogate, broken(surrogate, exam)) == exam.split.labels,
        transferred=shown(victim, to_transfer(surrogate, exam), exam),
    )


Answers = TypeVar("Answers", VictimAnswers, SurrogateAnswers)


def to_keep(answers: VictimAnswers | SurrogateAnswers) -> Checkpoint:
    """One side as unfinished work keeps it."""
    return Checkpoint({name: each for name, each in vars(answers).items() if each is not None}, {})


def as_kept(found: Checkpoint, side: type[Answers]) -> Answers:
    """The side that was kept."""
    # what a victim without a network does not answer was not kept either
    answers: dict[str, Any] = {field.name: None for field in fields(side) if str(field.type).endswith("None")}
    answers.update(found.tensors)
    return side(**answers)


def numbers(
    copy: SurrogateAnswers, control: SurrogateAnswers | None, known: VictimAnswers, exam: Exam
) -> dict[str, Any]:
    """All metrics of one surrogate; with a `control`, how far it gets beyond, image by image."""
    labels, mine, theirs = exam.split.labels, copy.predicted, known.predicted
    right, agrees = theirs == labels, mine == theirs
    found: dict[str, Any] = {
        "task_acc": Share.of(mine == labels),
        "acc_ratio": round(float((mine == labels).sum() / right.sum().clamp_min(1)), DIGITS),
        "fidelity": Share.of(agrees),
        "noise_fidelity": Share.of(copy.on_noise == known.on_noise),
        "kl": round(float(_divergence(known.probabilities, copy.log_probs)), DIGITS),
        "surrogate_robust_acc": Share.of(copy.robust),
        "victim_acc_under_transfer": Share.of(copy.transferred == labels),
    }
    if copy.on_attacked is not None and known.on_attacked is not None:
        found["robust_fidelity"] = Share.of(copy.on_attacked == known.on_attacked)
    if not right.all():
        found["fidelity_on_victim_errors"] = Share.of(agrees[~right])
    if right.any():  # an image that the victim gets wrong anyway is nobody's success
        fooled = (copy.transferred != labels)[right]
        found["transfer_asr"] = Share.of(fooled)
        found["random_sign_asr"] = Share.of((known.on_signs != labels)[right])
        if known.on_attacked is not None:
            found["white_box_asr"] = Share.of((known.on_attacked != labels)[right])
        if control is not None:
            found["d_transfer_asr"] = compare(fooled, (control.transferred != labels)[right], exam.seed)
    if control is not None:
        found["d_fidelity"] = compare(agrees, control.predicted == theirs, exam.seed)
        found["d_task_acc"] = compare(mine == labels, control.predicted == labels, exam.seed)
    return found


def _divergence(victim_NK: Tensor, log_probs_NK: Tensor) -> Tensor:
    """Mean KL(victim || surrogate) in nats."""
    return functional.kl_div(log_probs_NK, victim_NK.double(), reduction="batchmean")


def cost_to_honest(victim_NK: Tensor, told_NK: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """What an answer mode costs whoever asks in good faith: accuracy, and how far the confidences told are off.

    The distance is the mean total variation between what the victim thinks and what it says.
    """
    off = (victim_NK - told_NK).abs().sum(dim=1) / 2
    return {"honest_acc": Share.of(told_NK.argmax(1) == labels_N), "honest_distance": round(float(off.mean()), DIGITS)}

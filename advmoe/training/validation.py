"""Validation after each epoch: clean, FGSM and PGD accuracy, and the alarm for catastrophic overfitting.

Shapes: N images, C channel, H/W pixels.
"""

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd
from advmoe.models import inference
from advmoe.runtime.machine import derive_seed, device
from advmoe.training.batch_attacks import BatchAttack, CleanBatches
from advmoe.training.config import ValidatedTrainingConfig, Validation
from advmoe.training.job import DIGITS, Row, TrainingJob, TrainingTask
from advmoe.training.trainer_state import DivergedError

VALIDATION_BATCH = 200


def validate_epoch(task: TrainingTask, model: nn.Module, job: TrainingJob, epoch: int) -> Row:
    """Returns the validation columns of the history. Raises DivergedError when `model` outputs NaN or infinity."""
    row, clean, attacked = validate(model, job)
    if not torch.isfinite(inference.predict(model, clean, VALIDATION_BATCH)).all():
        raise DivergedError(f"{job.name}: the network outputs NaN or infinity after epoch {epoch}")
    return {**row, **task.validation_metrics(model, clean, attacked)}


def validate(model: nn.Module, job: TrainingJob) -> tuple[Row, Tensor, Tensor]:
    """Returns clean, FGSM and PGD accuracy on the validation images, and these clean and under PGD (N, C, H, W)."""
    assert isinstance(job.config, ValidatedTrainingConfig)
    split = job.dataset["validation"].first(job.config.validation.images)
    images, labels = split.pixels().to(device()), split.labels.to(device())
    clean = inference.predict(model, images, VALIDATION_BATCH).argmax(1) == labels
    row: Row = {"clean": _accuracy(clean)}
    adversarial = images
    for attack in (Fgsm(kind="fgsm"), _validation_pgd(job.config.validation)):
        adversarial = _attack(model, job, attack, images, labels, clean)
        robust = clean & (inference.predict(model, adversarial, VALIDATION_BATCH).argmax(1) == labels)
        row[attack.kind] = _accuracy(robust)
    return row, images, adversarial


def _validation_pgd(validation: Validation) -> Pgd:
    return Pgd(kind="pgd", steps=validation.steps, step_size=validation.step_size, restarts=1, loss="ce", targets=0)


def _attack(
    model: nn.Module, job: TrainingJob, attack: Fgsm | Pgd, images_NCHW: Tensor, labels_N: Tensor, correct_N: Tensor
) -> Tensor:
    batch_attack = BatchAttack(attack, LInf(job.epsilon))
    return engine.attack_dataset(
        model,
        images_NCHW,
        labels_N,
        correct_N,
        batch_attack.function,
        ball=batch_attack.ball,
        seed=derive_seed(job.seed, job.name, "validation"),
        purpose=attack.kind,
        precision=job.config.precision,
        batch_size=VALIDATION_BATCH,
    )


def _accuracy(correct_N: Tensor) -> float:
    return round(float(correct_N.float().mean()), DIGITS)


def overfitting_alarms(job: TrainingJob, row: Row) -> list[str]:
    """Returns an alarm for catastrophic overfitting, robustness to one step but not to several (Wong et al. 2020)."""
    if not isinstance(job.config, ValidatedTrainingConfig) or isinstance(job.adversary, CleanBatches):
        return []  # trained on clean images: PGD is also stronger than FGSM, but there is no overfitting to one step
    if row["fgsm"] - row["pgd"] <= job.config.validation.gap:
        return []
    return [
        f"{job.name}: FGSM accuracy {row['fgsm']:.3f} but PGD accuracy {row['pgd']:.3f} on validation: "
        "overfitted to one-step attacks"
    ]


def summary(row: Row) -> str:
    """Returns one console line for the history row of a validated epoch."""
    return (
        f"epoch {row['epoch']}: loss {row['loss']:.3f}, validation clean {row['clean']:.3f}, "
        f"FGSM {row['fgsm']:.3f}, PGD {row['pgd']:.3f}"
    )

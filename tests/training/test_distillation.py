"""Distillation: the loss by hand, a teacher that holds still, and a student that comes to answer as it does.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny import EPSILON, FACTS, RECIPE
from torch import Tensor, nn

from advmoe.data.dataset import Dataset, Split
from advmoe.models import classifiers, inference
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.machine import generator
from advmoe.training.baselines.distillation import DistillationTask
from advmoe.training.batch_attacks import PgdBatches
from advmoe.training.config import Optimizer, ValidatedTrainingConfig
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.job_key import checkpoint_name
from advmoe.training.single import PlainTask
from advmoe.training.trainer import fit

PGD = PgdBatches(kind="pgd", steps=(2,), step_size=0.5)
COUNT = 64


class Told(nn.Module):
    """Logits that are what they are, whatever the images; the first pixel of an image says which row."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows).log())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.rows[images_BCHW[:, 0, 0, 0].long()]


def kl(p: list[float], q: list[float]) -> float:
    return sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))


def images(row: int) -> Tensor:
    return torch.full((1, 1, 2, 2), float(row))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_loss_is_both_divergences_from_what_the_teacher_says_of_the_clean_image(alpha: float) -> None:
    clean, attacked = 0, 1
    teacher, student = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]
    task = DistillationTask(Told(student), ValidatedTrainingConfig(**RECIPE), Told(teacher), alpha)
    expected = (1 - alpha) * kl(teacher[clean], student[clean]) + alpha * kl(teacher[clean], student[attacked])
    for label in (0, 1):  # which play no part
        found = task.loss(images(attacked), torch.tensor([label]), images(clean))
        assert float(found.detach()) == pytest.approx(expected, abs=1e-6)


def test_only_the_student_learns() -> None:
    teacher, student = Told([[0.7, 0.2, 0.1]]), Told([[0.5, 0.25, 0.25]])
    task = DistillationTask(student, ValidatedTrainingConfig(**RECIPE), teacher, 0.5)
    task.on_step_start()
    task.loss(images(0), torch.tensor([0]), images(0)).backward()  # type: ignore[no-untyped-call]
    assert student.training
    assert student.rows.grad is not None
    assert not teacher.training
    assert teacher.rows.grad is None
    assert not teacher.rows.requires_grad


# ---- whole runs


def pixels(name: str) -> Split:
    stream = generator("test_distilled", name)
    return Split(
        torch.randint(0, 256, (COUNT, FACTS.channels, FACTS.height, FACTS.width), generator=stream).to(torch.uint8),
        torch.randint(0, FACTS.classes, (COUNT,), generator=stream),  # labels that say nothing
        torch.arange(COUNT),
    )


DATA = Dataset({"train": pixels("train"), "validation": pixels("validation")}, FACTS, "")


def network(seed: int, width: int = 8) -> nn.Module:
    """With opinions: logits of a new network are nearly alike."""
    model = classifiers.build(
        PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="cnn", width=width)), FACTS, seed
    )
    last = model.get_submodule("classify")
    assert isinstance(last, nn.Linear)
    last.weight.data.mul_(30)
    return model.eval()


def job(epochs: int) -> TrainingJob:
    optimizer = Optimizer(lr=0.05, momentum=0.9, weight_decay=0.0)
    recipe = ValidatedTrainingConfig(**RECIPE | {"epochs": epochs, "batch_size": 16, "optimizer": optimizer})
    return TrainingJob("distilled", 0, DATA, recipe, PGD, EPSILON, "pgd")


def distilled(teacher: nn.Module, epochs: int, alpha: float = 0.75) -> TrainingResult:
    held = job(epochs)
    return fit(DistillationTask(network(1), held.config, teacher, alpha), held)


def answers(model: nn.Module) -> Tensor:
    return inference.predict(model, DATA["train"].pixels(), COUNT).argmax(1)


def test_the_student_comes_to_answer_as_its_teacher_where_labels_say_nothing() -> None:
    teacher = network(0)
    agreed = float((answers(distilled(teacher, 30).model) == answers(teacher)).double().mean())
    held = job(30)
    from_labels = fit(PlainTask(network(1), held.config), held)
    assert len(set(answers(teacher).tolist())) > 1
    assert agreed > 0.8
    assert agreed > float((answers(from_labels.model) == answers(teacher)).double().mean()) + 0.2


def test_the_teacher_is_as_it_was() -> None:
    teacher = network(0)
    before = copy.deepcopy(teacher.state_dict())
    distilled(teacher, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_another_teacher_is_another_run() -> None:
    names = [
        checkpoint_name(
            "distilled",
            DistillationTask(network(1), ValidatedTrainingConfig(**RECIPE), network(seed), 0.5),
            DATA,
            job(1).settings,
        )
        for seed in (0, 0, 2)
    ]
    assert names[0] == names[1] != names[2]


def test_the_teachers_passes_are_paid_for() -> None:
    small, large = (distilled(network(0, width), 1).cost for width in (2, 8))
    assert small.flops_per_image == large.flops_per_image
    assert large.training_flops > small.training_flops
    assert replace(large, training_flops=0, total_training_flops=0) == replace(
        small, training_flops=0, total_training_flops=0
    )

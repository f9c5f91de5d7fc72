"""The smallest epsilon of each image, against the closed form of a linear model.

Shapes: N images, C channel, H/W pixels, K classes.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks.ball import L2, Ball, LInf, Norm, perturbation_norm
from advmoe.attacks.fab import FabT
from advmoe.attacks.pgd import Pgd
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget, evaluate
from advmoe.evaluation.minimal_perturbation import minimal_epsilons
from advmoe.runtime.machine import generator
from advmoe.statistics.decisions import CLEAN

COUNT = 12
FAB = FabT(kind="fab-t", steps=10, targets=2, restarts=1)
PGD = Pgd(kind="pgd", steps=5, step_size=0.5, restarts=1, loss="ce", targets=0)
BALLS: dict[Norm, Ball] = {"linf": LInf(0.01), "l2": L2(0.08)}
every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Linear(nn.Module):
    """logits = W (x - 1/2), three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(torch.randn(3, 64, generator=generator("test_minimal", "weight")))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return (images_NCHW - 0.5).flatten(1) @ self.weight_KD.T

    def radius(self, images_NCHW: Tensor, norm: Norm) -> Tensor:
        """Distance to the closest boundary of the predicted class, far from the walls (N,)."""
        with torch.no_grad():
            logits_NK = self(images_NCHW)
            labels_N = logits_NK.argmax(1)
            leads_NK = logits_NK.gather(1, labels_N[:, None]) - logits_NK
            apart_NKD = self.weight_KD[labels_N][:, None] - self.weight_KD
            radii_NK = leads_NK / apart_NKD.norm(p=1 if norm == "linf" else 2, dim=2)
            radii_NK[torch.arange(len(labels_N)), labels_N] = torch.inf
            smallest: Tensor = radii_NK.amin(1)
            return smallest


class Cramped(Linear):
    """Raises out of memory for gradients of more than five images."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(images_NCHW) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(images_NCHW)


class Constant(nn.Module):
    """Predicts class 0 for every image."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]) + 0 * images_NCHW.flatten(1).sum(1, keepdim=True)


def pixels() -> Tensor:
    return 0.4 + 0.2 * torch.rand(COUNT, 1, 8, 8, generator=generator("test_minimal", "pixels"))


def make_target(model: nn.Module, wrong: list[int] | None = None) -> EvaluationTarget:
    """Labels as the model predicts them, except for the images `wrong`."""
    with torch.no_grad():
        labels = model(pixels()).argmax(1)
    labels[wrong or []] = (labels[wrong or []] + 1) % 2
    return EvaluationTarget("tiny", model.eval(), pixels(), labels)


def make_config(norm: Norm, batch_size: int | None = None) -> EvaluationConfig:
    return EvaluationConfig(BALLS[norm], 0, "float32", batch_size, drop_fallen=False)


def bounds(target: EvaluationTarget, norm: Norm, batch_size: int | None = None, settings: FabT = FAB) -> Tensor:
    config = make_config(norm, batch_size)
    return minimal_epsilons(target, settings, evaluate(target, {}, config), config)


@every_norm
def test_bounds_of_a_linear_model_are_its_distances(norm: Norm) -> None:
    model = Linear()
    found, radius = bounds(make_target(model), norm), model.radius(pixels(), norm)
    assert (found >= radius * (1 - 1e-4)).all()  # never below: each bound is the distance of a misclassified point
    assert (found <= radius * 1.05).all()


@every_norm
def test_bounds_do_not_depend_on_the_batch_size(norm: Norm) -> None:
    target = make_target(Linear())
    whole = bounds(target, norm, COUNT)
    for batch_size in (1, 5):
        torch.testing.assert_close(bounds(target, norm, batch_size), whole, atol=1e-4, rtol=1e-3)


def test_an_image_that_is_wrong_already_needs_no_change() -> None:
    found = bounds(make_target(Linear(), wrong=[2, 7]), "linf")
    assert (found == 0).nonzero().squeeze(1).tolist() == [2, 7]


def test_a_model_that_is_always_wrong_needs_no_attack() -> None:
    target = make_target(Constant(), wrong=list(range(COUNT)))
    assert torch.equal(bounds(target, "linf"), torch.zeros(COUNT))


def test_where_nothing_is_found_there_is_no_bound() -> None:
    assert bounds(make_target(Constant()), "linf").isinf().all()


@every_norm
def test_what_other_attacks_found_counts_where_it_is_closer(norm: Norm) -> None:
    """The closer of both bounds is used."""
    target, config = make_target(Linear()), make_config(norm)
    weak = FabT(kind="fab-t", steps=1, targets=1, restarts=1)
    alone = minimal_epsilons(target, weak, evaluate(target, {}, config), config)
    result = evaluate(target, {"pgd": PGD}, config)
    misclassified = ~result.correct["pgd"]
    assert 0 < misclassified.sum() < COUNT
    together = minimal_epsilons(target, weak, result, config)
    theirs = perturbation_norm(result.outcomes["pgd"].images - target.images, norm)
    assert torch.equal(together, torch.where(misclassified, torch.minimum(alone, theirs), alone))
    assert (together[misclassified] <= config.ball.epsilon + 1e-6).all()


def test_images_that_were_not_attacked_give_no_bound() -> None:
    """A dropped image is not correct after later attacks either, but there its image is the clean one."""
    target, config = make_target(Linear()), EvaluationConfig(BALLS["linf"], 0, "float32", None, drop_fallen=True)
    result = evaluate(target, {"pgd": PGD, "later": PGD}, config)
    dropped = result.correct[CLEAN] & ~result.outcomes["later"].attacked
    assert dropped.any()
    assert (minimal_epsilons(target, FAB, result, config)[dropped] > 1e-5).all()


class PrecisionDependent(nn.Module):
    """Class 0 in float32, class 1 under autocast."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        side = -1.0 if torch.is_autocast_enabled("cpu") else 1.0
        score_N = side * (5 + images_NCHW.flatten(1).mean(1))
        return torch.stack([score_N, torch.zeros_like(score_N)], dim=1)


def test_a_bound_is_verified_in_float32() -> None:
    target = make_target(PrecisionDependent())
    config = EvaluationConfig(LInf(0.05), 0, "bfloat16", None, drop_fallen=False)
    result: EvaluationResult = evaluate(target, {}, config)
    assert minimal_epsilons(target, FAB, result, config).isinf().all()


@every_norm
def test_a_batch_that_memory_does_not_hold_is_halved(norm: Norm) -> None:
    roomy, cramped = (bounds(make_target(model), norm, COUNT) for model in (Linear(), Cramped()))
    torch.testing.assert_close(cramped, roomy, atol=1e-4, rtol=1e-3)

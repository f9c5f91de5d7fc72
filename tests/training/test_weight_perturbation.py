"""Adversarial weight perturbation: where weights stand for a gradient, and that nothing of it stays."""

import copy
from typing import Any

import pytest
import torch
from tiny import CONSTANT, EPSILON, FACTS, RECIPE, patterned, patterned_set
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.machine import generator
from advmoe.training.batch_attacks import CleanBatches, PgdBatches
from advmoe.training.config import Optimizer
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.single import PlainTask, SingleConfig
from advmoe.training.trainer import Trainer, fit
from advmoe.training.weight_perturbation import perturbed_weights

GAMMA = 0.05
CLEAN = CleanBatches(kind="clean")
PLAIN_SGD = Optimizer(lr=0.1, momentum=0.0, weight_decay=0.0)


def stream(*parts: object) -> torch.Generator:
    return generator("test_awp", *parts)


def make_model() -> nn.Module:
    return classifiers.build(PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="cnn", width=3)), FACTS, 0)


def batch() -> tuple[Tensor, Tensor]:
    split = patterned(stream, 8, "batch")
    return split.pixels(), split.labels


def with_gradients(model: nn.Module) -> nn.Module:
    images, labels = batch()
    torch.autograd.backward(functional.cross_entropy(model.train()(images), labels))
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def recipe_of(**changes: Any) -> SingleConfig:
    return SingleConfig(validation_epsilon=EPSILON, **RECIPE | {"optimizer": PLAIN_SGD, "schedule": CONSTANT} | changes)


def run_of(model: nn.Module, **changes: Any) -> Trainer:
    recipe = recipe_of(**changes)
    return Trainer(
        PlainTask(model, recipe), TrainingJob("tiny", 0, patterned_set(stream), recipe, CLEAN, EPSILON, "clean")
    )


# ---- where the weights stand


def test_weights_move_uphill_by_a_share_of_their_norm_and_vectors_stay() -> None:
    model = with_gradients(make_model())
    before = tensors(model)
    moved = 0
    with perturbed_weights(model, GAMMA):
        for name, parameter in model.named_parameters():
            change = parameter.detach() - before[name]
            if parameter.ndim == 1:
                assert torch.equal(change, torch.zeros_like(change)), name
                continue
            moved += 1
            gradient = parameter.grad
            assert gradient is not None
            assert float(change.norm()) == pytest.approx(GAMMA * float(before[name].norm()), rel=1e-3)
            torch.testing.assert_close(change / change.norm(), gradient / gradient.norm(), atol=1e-4, rtol=0)
    assert moved == 4  # three convolutions and the last layer


def test_the_loss_is_higher_there() -> None:
    model, (images, labels) = with_gradients(make_model()), batch()

    @torch.no_grad()
    def loss() -> float:
        return float(functional.cross_entropy(model(images), labels))

    before = loss()
    with perturbed_weights(model, GAMMA):
        inside = loss()
    assert inside > before + 0.01


@pytest.mark.parametrize("end", [None, RuntimeError])
def test_afterwards_all_is_as_it_was_to_the_bit(end: type[Exception] | None) -> None:
    """Statistics of BatchNorm, too, and also after an error."""
    model, (images, _) = with_gradients(make_model()), batch()
    before = tensors(model)

    def inside() -> None:
        with perturbed_weights(model, GAMMA):
            model(images)  # in train mode: statistics move
            assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            if end is not None:
                raise end

    if end is None:
        inside()
    else:
        with pytest.raises(end):
            inside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_has_no_gradient_or_one_of_zero_stays() -> None:
    model = with_gradients(make_model())
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    layers[0].weight.grad = None
    assert layers[1].weight.grad is not None
    layers[1].weight.grad.zero_()
    before = tensors(model)
    with perturbed_weights(model, GAMMA):
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert torch.isfinite(layers[1].weight).all()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert names[id(layers[2].weight)] in changed
    assert not changed & {names[id(layer.weight)] for layer in layers[:2]}


# ---- a step of training


def test_a_step_goes_from_the_old_weights_by_the_gradient_at_the_perturbed_ones() -> None:
    images, labels = batch()
    model = make_model()
    by_hand = with_gradients(copy.deepcopy(model))  # its statistics have moved once, as they should
    expected = tensors(by_hand)
    with perturbed_weights(by_hand, GAMMA):
        by_hand.zero_grad()
        loss = functional.cross_entropy(by_hand(images), labels)
        torch.autograd.backward(loss)
    slopes = {name: parameter.grad for name, parameter in by_hand.named_parameters()}
    run = run_of(model, awp=GAMMA)
    found = run.step(images, labels)
    torch.testing.assert_close(found, loss.detach())
    assert run.state.images_learned == 2 * len(labels)
    for name, tensor in model.state_dict().items():
        slope = slopes.get(name)
        there = expected[name] if slope is None else expected[name] - 0.1 * slope
        torch.testing.assert_close(tensor, there, atol=1e-6, rtol=1e-5, msg=name)


def test_a_step_without_it_takes_one_gradient() -> None:
    images, labels = batch()
    plain, perturbed = make_model(), make_model()
    run = run_of(plain, awp=0.0)
    run.step(images, labels)
    assert run.state.images_learned == len(labels)
    run_of(perturbed, awp=GAMMA).step(images, labels)
    pairs = list(zip(plain.named_parameters(), perturbed.parameters(), strict=True))
    assert any(not torch.equal(left, right) for (_, left), right in pairs)


def trained(awp: float) -> TrainingResult:
    recipe = recipe_of(awp=awp, epochs=3, optimizer=Optimizer(lr=0.05, momentum=0.9, weight_decay=0.0005))
    adversary = PgdBatches(kind="pgd", steps=(2,), step_size=0.5)
    job = TrainingJob("tiny", 0, patterned_set(stream), recipe, adversary, EPSILON, "pgd")
    return fit(PlainTask(make_model(), recipe), job)


def test_a_whole_run_learns_and_pays_for_every_gradient() -> None:
    found, plain = trained(0.01), trained(0.0)
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    assert found.cost.learning == 2 * plain.cost.learning
    assert found.cost.crafting_backward == plain.cost.crafting_backward
    assert found.cost.training_flops > 1.2 * plain.cost.training_flops

"""Activation checkpointing: less memory, and not one number that differs.

Shapes: B batch, C channel, H/W pixels.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.data.dataset import DatasetInfo
from advmoe.models import classifiers, inference
from advmoe.models.activation_checkpointing import _temporary_buffers
from advmoe.models.classifiers import (
    BackboneKind,
    BackboneSettings,
    ConfidenceSettings,
    GateSettings,
    MixtureArchitecture,
    UniformGateSettings,
)
from advmoe.models.inference import Precision
from advmoe.models.mixture import Mixing, MixtureOfExperts
from advmoe.runtime.machine import generator

FACTS = DatasetInfo(channels=3, height=16, width=16, class_names=("a", "b", "c"), mean=(0.5,) * 3, std=(0.25,) * 3)
IMAGES = torch.rand(6, 3, 16, 16, generator=generator("test_checkpointing", "images"))
LABELS = torch.arange(6) % 3
GATE = GateSettings(width=4, temperature=1.0)
EXPERTS = 5


def mixture(
    *,
    kind: BackboneKind = "resnet18",
    gate: GateSettings | UniformGateSettings | ConfidenceSettings = GATE,
    mixing: Mixing = "probabilities",
    checkpointing: bool = False,
) -> MixtureOfExperts:
    names = tuple(f"expert-{number}" for number in range(EXPERTS))
    architecture = MixtureArchitecture(
        kind="mixture", backbone=BackboneSettings(kind=kind, width=4), experts=names, gate=gate, mixing=mixing
    )
    model = classifiers.build(architecture, FACTS, 0)
    assert isinstance(model, MixtureOfExperts)
    model.checkpointing = checkpointing
    return model.train()


def learned(model: MixtureOfExperts, precision: Precision = "float32", steps: int = 2) -> list[Tensor]:
    """After so many steps of SGD: losses, gradients of the last step, and all of the state, counters included."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with inference.autocast(IMAGES.device, precision):
            loss = functional.nll_loss(model(IMAGES), LABELS)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*losses, *gradients, *model.state_dict().values()]


def saved_bytes(model: MixtureOfExperts) -> int:
    """What a forward pass leaves for the backward pass, the weights aside."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # or a pointer could be given out twice

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        sizes[saved.data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(IMAGES)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet18", "wideresnet28", "cnn"])
def test_losses_gradients_and_running_statistics_are_those_of_the_plain_path(
    kind: BackboneKind, precision: Precision
) -> None:
    plain, lean = (learned(mixture(kind=kind, checkpointing=on), precision) for on in (False, True))
    assert len(plain) == len(lean)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, lean, strict=True))


@pytest.mark.parametrize(
    ("gate", "mixing"),
    [
        (UniformGateSettings(kind="uniform"), "probabilities"),
        (ConfidenceSettings(kind="confidence", temperature=1.0), "top1"),
    ],
)
def test_so_they_are_with_other_ways_to_weigh_the_experts(
    gate: UniformGateSettings | ConfidenceSettings, mixing: Mixing
) -> None:
    plain, lean = (learned(mixture(gate=gate, mixing=mixing, checkpointing=on)) for on in (False, True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, lean, strict=True))


def test_frozen_experts_in_eval_mode_stay_as_they_are() -> None:
    """As in MoRE: the mixture learns, its experts but for their last layers do not."""
    model = mixture(checkpointing=True)
    model.experts.requires_grad_(False).eval()
    for expert in model.experts:
        expert.get_submodule("classify").requires_grad_(True)
    before = copy.deepcopy(model.experts.state_dict())
    torch.autograd.backward(functional.nll_loss(model(IMAGES), LABELS))
    assert all(torch.equal(before[name], now) for name, now in model.experts.state_dict().items())
    assert all(expert.get_submodule("classify").weight.grad is not None for expert in model.experts)


def test_statistics_move_once_a_step() -> None:
    model = mixture(checkpointing=True)
    torch.autograd.backward(functional.nll_loss(model(IMAGES), LABELS))
    counters = [layer.num_batches_tracked for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {int(counter) for counter in counters if counter is not None} == {1}


def test_little_waits_for_the_backward_pass() -> None:
    plain, lean = (saved_bytes(mixture(checkpointing=on)) for on in (False, True))
    assert lean < plain / 10


def noted(order: list[str], what: str) -> Callable[..., None]:
    """A hook that notes that it was called."""
    return lambda *_: order.append(what)


def test_the_backward_pass_holds_one_expert_at_a_time() -> None:
    """Each expert is computed again only when the backward pass of the one after it is over."""
    model = mixture(checkpointing=True)
    order: list[str] = []
    output = model(IMAGES)
    for number, expert in enumerate(model.experts):
        expert.register_forward_pre_hook(noted(order, f"again {number}"))
        first = next(expert.parameters())
        first.register_post_accumulate_grad_hook(noted(order, f"done {number}"))  # type: ignore[no-untyped-call]
    torch.autograd.backward(functional.nll_loss(output, LABELS))
    assert order == [f"{what} {number}" for number in reversed(range(EXPERTS)) for what in ("again", "done")]


def test_attacks_and_predictions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr("advmoe.models.mixture.run_checkpointed", refuse)
    model = mixture(checkpointing=True)
    with engine.attack_mode(model, "float32") as frozen_model:
        torch.autograd.backward(frozen_model(IMAGES.clone().requires_grad_(True)).sum())
    inference.predict(model, IMAGES, len(IMAGES))
    with torch.no_grad():
        model.train()(IMAGES)
    with pytest.raises(AssertionError, match="computed again"):
        model(IMAGES)


def test_buffers_come_back_even_after_an_error() -> None:
    layer = nn.BatchNorm2d(2)
    mean = layer.running_mean

    def fail() -> None:
        with _temporary_buffers(layer):
            layer(torch.ones(4, 2, 1, 1))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert mean is not None
    assert layer.running_mean is mean
    assert torch.equal(mean, torch.zeros(2))

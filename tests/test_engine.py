"""Where attacks run: what crafting must leave alone, and what counts as a decision.

Shapes: B batch, N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from advmoe import engine
from advmoe.attacks import catalogue
from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.draws import BatchDraws
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.engine import Attacked, Precision
from advmoe.machine import generator
from advmoe.models.gate import Gate
from advmoe.models.layers import ConvNorm
from advmoe.models.moe import MixtureOfExperts
from advmoe.models.resnet import ResNet18

PGD = Pgd(kind="pgd", steps=5, step_size=0.25, restarts=1, loss="ce")
FGSM = Fgsm(kind="fgsm")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
CLASSES = 3
COUNT = 20


def stream(*parts: object) -> torch.Generator:
    return generator("test_engine", *parts)


def make_resnet(seed: int = 0) -> ResNet18:
    """A small network whose decisions vary: weights from a seed, BatchNorm statistics from some batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet18(channels=1, classes=CLASSES, width=4, mean=(0.5,), std=(0.3,))
    model.train()
    with torch.no_grad():
        for step in range(10):
            model(torch.rand(32, 1, 8, 8, generator=stream("life", step)))
    return model


def make_mixture() -> MixtureOfExperts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = Gate(channels=1, experts=2, width=2, temperature=1.0, mean=(0.5,), std=(0.3,))
    return MixtureOfExperts([make_resnet(0), make_resnet(1)], gate, "probabilities")


def pixels(count: int = COUNT) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=stream("pixels"))


def decisions(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    return engine.predict(model, images_NCHW, COUNT).argmax(1)


# ---- crafting leaves the model as it was


Crafter = Callable[[nn.Module, Tensor, Tensor], Tensor]


def crafted(precision: Precision) -> Crafter:
    def craft(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        return engine.craft(model, images_BCHW, labels_B, PGD, LInf(0.1), BatchDraws(stream("craft")), precision)

    return craft


def crafted_in_train_mode(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: the classic BatchNorm bug, adversarial batches that pass through the running statistics."""
    draws = BatchDraws(stream("craft"))
    return pgd(model, images_BCHW, labels_B, ball=LInf(0.1), settings=PGD, draws=draws)


def crafted_and_left_in_eval_mode(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: statistics are safe, but the next update would run with them frozen."""
    return crafted_in_train_mode(model.eval(), images_BCHW, labels_B)


def crafted_and_left_frozen(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: a model that can no longer learn."""
    found = crafted("float32")(model, images_BCHW, labels_B)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return found


def leaves_the_model_as_it_was(craft: Crafter, model: nn.Module) -> bool:
    """Weights, BatchNorm statistics, gradients, and every layer's and parameter's own mode."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    images = pixels(8)
    found = craft(model, images, torch.arange(8) % CLASSES)
    assert not torch.equal(found, images), "nothing was crafted, so nothing was tested"
    return (
        all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        and [module.training for module in model.modules()] == modes
        and [parameter.requires_grad for parameter in model.parameters()] == learning
        and all(parameter.grad is None for parameter in model.parameters())
        and not any(layer.is_folded for layer in model.modules() if isinstance(layer, ConvNorm))
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [make_resnet, make_mixture])
def test_crafting_leaves_the_model_as_it_was(make: Callable[[], nn.Module], precision: Precision) -> None:
    assert leaves_the_model_as_it_was(crafted(precision), make().train())


def test_crafting_puts_back_mixed_modes() -> None:
    """Part of the model in eval mode, part of it not to be trained: that is what must come back."""
    mixture = make_mixture().train()
    mixture.experts[0].eval()
    for parameter in mixture.experts[1].parameters():
        parameter.requires_grad_(False)
    assert leaves_the_model_as_it_was(crafted("float32"), mixture)
    assert mixture.gate.training
    assert not mixture.experts[0].training


@pytest.mark.parametrize("bug", [crafted_in_train_mode, crafted_and_left_in_eval_mode, crafted_and_left_frozen])
def test_planted_crafting_bugs_are_caught(bug: Crafter) -> None:
    assert not leaves_the_model_as_it_was(bug, make_resnet().train())


def test_crafting_puts_the_model_back_after_an_error() -> None:
    model = make_resnet().train()
    with pytest.raises(RuntimeError, match="planted"), engine.crafting(model, "float32"):
        raise RuntimeError("planted")
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_crafting_sees_the_model_in_eval_mode() -> None:
    model = make_resnet().train()
    with engine.crafting(model, "float32") as cheap, torch.no_grad():
        found = cheap(pixels())
    torch.testing.assert_close(found, engine.predict(model, pixels(), COUNT), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(pixels()), found, atol=1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_crafting_gives_float32_logits_and_no_gradients_for_weights(precision: Precision) -> None:
    with engine.crafting(make_resnet(), precision) as cheap:
        assert cheap(pixels()).dtype == torch.float32
        assert not cheap(pixels()).requires_grad
        assert cheap(pixels().requires_grad_(True)).requires_grad


def test_crafting_does_not_depend_on_the_mode_before() -> None:
    model = make_resnet()
    labels = torch.arange(8) % CLASSES
    trained = crafted("float32")(model.train(), pixels(8), labels)
    assert torch.equal(crafted("float32")(model.eval(), pixels(8), labels), trained)


# ---- predictions


def test_predict_does_not_depend_on_the_batch_size() -> None:
    model = make_resnet()
    whole = engine.predict(model, pixels(), COUNT)
    assert len(set(whole.argmax(1).tolist())) > 1, "a constant classifier proves nothing"
    for batch_size in (1, 3, 7, 64):
        found = engine.predict(model, pixels(), batch_size)
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.argmax(1), whole.argmax(1))


def test_predict_does_not_depend_on_neighbours() -> None:
    """At one batch size not even the rounding may differ: an image alone, and in another order."""
    model = make_resnet()
    whole = engine.predict(model, pixels(), COUNT)
    order = torch.randperm(COUNT, generator=stream("order"))
    torch.testing.assert_close(engine.predict(model, pixels()[order], COUNT), whole[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(engine.predict(model, pixels()[4:5], COUNT), whole[4:5], atol=1e-6, rtol=1e-6)


def test_predict_runs_in_eval_mode_and_puts_the_mode_back() -> None:
    model = make_resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_train_mode = engine.predict(model, pixels(), 7)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(engine.predict(model.eval(), pixels(), 7), in_train_mode)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()), in_train_mode, atol=1e-4, rtol=1e-4)


def test_predict_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        engine.predict(make_resnet(), pixels()[:0], 4)


# ---- attacks


def some_wrong(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Labels that the model gets right except on every fourth image, and which those are."""
    labels, wrong = decisions(model, pixels()), torch.arange(COUNT) % 4 == 0
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    return labels, wrong


def attacked(
    model: nn.Module,
    labels_N: Tensor,
    ball: Ball,
    *,
    settings: catalogue.Attack = PGD,
    batch_size: int = 7,
    precision: Precision = "float32",
    seed: int = 0,
) -> Attacked:
    """All batches of an attack on the same images in one."""
    parts = list(
        engine.attack(model, pixels(), labels_N, settings, ball, seed=seed, batch_size=batch_size, precision=precision)
    )
    assert [len(part.images) for part in parts] == [len(batch) for batch in torch.split(labels_N, batch_size)]
    return Attacked(
        torch.cat([part.images for part in parts]),
        torch.cat([part.clean_logits for part in parts]),
        torch.cat([part.logits for part in parts]),
    )


@pytest.mark.parametrize("settings", [FGSM, PGD], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ball", [LInf(0.15), L2(0.8)], ids=["linf", "l2"])
def test_attack_stays_inside_and_spares_the_wrong(
    settings: catalogue.Attack, precision: Precision, ball: LInf | L2
) -> None:
    model = make_resnet()
    labels, wrong = some_wrong(model)
    found = attacked(model, labels, ball, settings=settings, precision=precision)
    change = (found.images.double() - pixels().double()).flatten(1)
    order = torch.inf if isinstance(ball, LInf) else 2
    assert (torch.linalg.vector_norm(change, order, dim=1) <= ball.epsilon + 1e-6).all()
    assert (found.images >= 0).all()
    assert (found.images <= 1).all()
    assert torch.equal(found.images[wrong], pixels()[wrong])
    assert (change[~wrong] != 0).any(dim=1).all()
    assert not found.correct(labels)[wrong].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attack_reports_what_float32_says(precision: Precision) -> None:
    model = make_resnet()
    labels, wrong = some_wrong(model)
    found = attacked(model, labels, LInf(0.15), precision=precision)
    torch.testing.assert_close(found.clean_logits, engine.predict(model, pixels(), 7))
    torch.testing.assert_close(found.logits, engine.predict(model, found.images, 7))
    expected = ~wrong & (decisions(model, found.images) == labels)
    assert torch.equal(found.correct(labels), expected)
    assert 0 < expected.sum() < (~wrong).sum()  # some fell, some stood


def test_correct_needs_both_clean_and_attacked() -> None:
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    both = Attacked(torch.zeros(4, 1, 1, 1), torch.cat([right, right, wrong, wrong]), torch.cat([right, wrong] * 2))
    assert both.correct(torch.zeros(4, dtype=torch.long)).tolist() == [True, False, False, False]


def test_attack_decisions_do_not_depend_on_the_batch_size() -> None:
    model = make_resnet()
    labels, _ = some_wrong(model)
    whole = attacked(model, labels, LInf(0.1), batch_size=COUNT)
    assert 0 < whole.correct(labels).sum() < COUNT
    for batch_size in (1, 6):
        found = attacked(model, labels, LInf(0.1), batch_size=batch_size)
        assert torch.equal(found.correct(labels), whole.correct(labels))
        # one pixel whose gradient is all but zero may take its step the other way after another rounding
        same = (found.images - whole.images).abs() < 1e-4
        assert same.double().mean() > 0.98


def test_attack_is_repeatable_and_its_start_follows_the_seed() -> None:
    model = make_resnet()
    labels, _ = some_wrong(model)
    first = attacked(model, labels, LInf(0.1))
    assert torch.equal(attacked(model, labels, LInf(0.1)).images, first.images)
    assert not torch.equal(attacked(model, labels, LInf(0.1), seed=1).images, first.images)


def test_attack_leaves_the_model_as_it_was() -> None:
    model = make_resnet().train()
    labels, _ = some_wrong(model)

    def craft(network: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        del images_BCHW, labels_B
        return attacked(network, labels, LInf(0.1), precision="bfloat16").images[:8]

    assert leaves_the_model_as_it_was(craft, model)


class TwoFaced(nn.Module):
    """Sure of class 0 in float32, of class 1 under autocast: what an attack sees there must not count."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        side = -1.0 if torch.is_autocast_enabled("cpu") else 1.0
        score_B = side * (5 + images_BCHW.flatten(1).mean(1))
        return torch.stack([score_B, torch.zeros_like(score_B)], dim=1)


@pytest.mark.parametrize("settings", [FGSM, PGD], ids=["fgsm", "pgd"])
def test_success_counts_only_in_float32(settings: catalogue.Attack) -> None:
    model, labels = TwoFaced(), torch.zeros(COUNT, dtype=torch.long)
    with engine.crafting(model, "bfloat16") as cheap:
        assert (cheap(pixels()).argmax(1) == 1).all()  # the attack believes that it has won
    found = attacked(model, labels, LInf(0.1), settings=settings, precision="bfloat16")
    assert found.correct(labels).all()


def test_pgd_goes_on_until_float32_agrees() -> None:
    """Retired at the first point that bfloat16 gets wrong, the images would be the random starts, inside the ball."""
    labels = torch.zeros(COUNT, dtype=torch.long)
    long = PGD.model_copy(update={"steps": 10})
    found = attacked(TwoFaced(), labels, LInf(0.01), settings=long, precision="bfloat16")
    change = (found.images - pixels()).abs()
    # all steps go one way on this model, so nearly every pixel that the box does not hold has reached the wall
    assert (change > 0.0099).double().mean() > 0.9


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_a_cheating_attack_is_brought_back_before_it_is_scored(
    monkeypatch: pytest.MonkeyPatch, ball: LInf | L2
) -> None:
    model = make_resnet()
    labels, wrong = some_wrong(model)

    def cheat(*args: object, **kwargs: object) -> Tensor:
        del kwargs
        images = args[2]
        assert isinstance(images, Tensor)
        return 1 - 2 * images  # far outside ball and box

    monkeypatch.setattr(catalogue, "run", cheat)
    found = attacked(model, labels, ball)
    change = (found.images.double() - pixels().double()).flatten(1)
    order = torch.inf if isinstance(ball, LInf) else 2
    assert (torch.linalg.vector_norm(change, order, dim=1) <= ball.epsilon + 1e-6).all()
    assert (found.images.clamp(0, 1) == found.images).all()
    assert (change[~wrong] != 0).any()
    torch.testing.assert_close(found.logits, engine.predict(model, found.images, 7))


def test_attack_on_a_model_that_is_always_wrong_returns_the_clean_images() -> None:
    model = make_resnet()
    labels = (decisions(model, pixels()) + 1) % CLASSES
    found = attacked(model, labels, LInf(0.1))
    assert torch.equal(found.images, pixels())
    assert not found.correct(labels).any()


def test_stronger_attack_leaves_fewer_correct() -> None:
    model = make_resnet()
    labels = decisions(model, pixels())
    left = [int(attacked(model, labels, LInf(epsilon)).correct(labels).sum()) for epsilon in (0.0, 0.03, 0.1, 0.3)]
    assert left[0] == COUNT
    assert left == sorted(left, reverse=True)
    assert left[-1] < COUNT / 2


# ---- context managers


def test_autocast_casts_only_when_asked() -> None:
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with engine.autocast(torch.device("cpu"), "float32"):
        assert (left @ right).dtype == torch.float32
    with engine.autocast(torch.device("cpu"), "bfloat16"):
        assert (left @ right).dtype == torch.bfloat16


def test_frozen_spares_parameters_that_did_not_learn_before() -> None:
    model = make_resnet()
    model.classify.weight.requires_grad_(False)
    with engine.frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.classify.weight.requires_grad
    assert model.classify.bias.requires_grad

"""Where attacks run: what crafting must leave alone, and what counts as a decision.

Shapes: B batch, N images, C channel, H/W pixels, K classes.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch._dynamo.exc
import torch._dynamo.utils
from torch import Tensor, nn

from advmoe.attacks import engine, registry
from advmoe.attacks.ball import L2, Ball, Draws, LInf
from advmoe.attacks.engine import AttackResult, PassCount
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.interface import AttackFn, IsAdversarial, Model, input_gradient
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchDraws, ImageDraws
from advmoe.attacks.registry import AnyAttack
from advmoe.core.errors import UserError
from advmoe.models import inference
from advmoe.models.gate import Gate
from advmoe.models.inference import Precision
from advmoe.models.layers import ConvNorm
from advmoe.models.mixture import MixtureOfExperts
from advmoe.models.resnet import ResNet18
from advmoe.runtime import machine
from advmoe.runtime.machine import generator

PGD = Pgd(kind="pgd", steps=5, step_size=0.25, restarts=1, loss="ce", targets=0)
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
    return inference.predict(model, images_NCHW, COUNT).argmax(1)


# ---- crafting leaves the model as it was


Crafter = Callable[[nn.Module, Tensor, Tensor], Tensor]


def crafted(precision: Precision) -> Crafter:
    def craft(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        with engine.attack_mode(model, precision) as cheap:
            return crafted_in_train_mode(cheap, images_BCHW, labels_B)

    return craft


def crafted_in_train_mode(model: Model, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: the classic BatchNorm bug, adversarial batches that pass through the running statistics."""
    draws = BatchDraws(stream("craft"))
    return pgd(model, images_BCHW, labels_B, ball=LInf(0.1), settings=PGD, draws=draws)


def struck_with_pgd(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    return struck(model, images_BCHW, labels_B, LInf(0.1), precision="bfloat16").images


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


@pytest.mark.parametrize("make", [make_resnet, make_mixture])
def test_striking_leaves_the_model_as_it_was(make: Callable[[], nn.Module]) -> None:
    assert leaves_the_model_as_it_was(struck_with_pgd, make().train())


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
    with pytest.raises(RuntimeError, match="planted"), engine.attack_mode(model, "float32"):
        raise RuntimeError("planted")
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_crafting_sees_the_model_in_eval_mode() -> None:
    model = make_resnet().train()
    with engine.attack_mode(model, "float32") as cheap, torch.no_grad():
        found = cheap(pixels())
    torch.testing.assert_close(found, inference.predict(model, pixels(), COUNT), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(pixels()), found, atol=1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_crafting_gives_float32_logits_and_no_gradients_for_weights(precision: Precision) -> None:
    with engine.attack_mode(make_resnet(), precision) as cheap:
        assert cheap(pixels()).dtype == torch.float32
        assert not cheap(pixels()).requires_grad
        assert cheap(pixels().requires_grad_(True)).requires_grad


def test_crafting_does_not_depend_on_the_mode_before() -> None:
    model = make_resnet()
    labels = torch.arange(8) % CLASSES
    trained = crafted("float32")(model.train(), pixels(8), labels)
    assert torch.equal(crafted("float32")(model.eval(), pixels(8), labels), trained)


# ---- the cheap form of a mixture, and what passes cost


def test_passes_are_counted_in_images() -> None:
    passes = PassCount()
    labels = torch.arange(8) % CLASSES
    with engine.attack_mode(make_resnet(), "float32", passes) as cheap:
        with torch.no_grad():
            cheap(pixels(5))
            cheap(pixels(5).requires_grad_(True))  # nothing can flow back from here
        assert passes == PassCount(forward=10, backward=0)
        input_gradient(cheap, pixels(8), labels, "ce")
        assert passes == PassCount(forward=18, backward=8)


def test_passes_through_a_mixture_are_counted_however_it_is_taken_apart() -> None:
    passes = PassCount()
    with engine.attack_mode(make_mixture(), "float32", passes) as cheap, torch.no_grad():
        cheap.parts(pixels(3))
        assert passes == PassCount(forward=3)
        for vote in cheap.votes():
            vote(pixels(4))
    assert passes == PassCount(forward=11)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cheap_mixture_taken_apart_is_the_mixture(precision: Precision) -> None:
    mixture = make_mixture()
    with engine.attack_mode(mixture, precision) as cheap, torch.no_grad():
        assert cheap.mixing == "probabilities"
        parts, whole = cheap.parts(pixels()), cheap(pixels())
        votes = torch.stack([vote(pixels()) for vote in cheap.votes()], dim=1)
    assert {part.dtype for part in parts} == {torch.float32}
    atol, rtol = (1e-4, 1e-4) if precision == "float32" else (0.2, 0.1)
    torch.testing.assert_close(parts.log_probs_BK, whole, atol=atol, rtol=rtol)
    torch.testing.assert_close(parts.logits_BEK, votes, atol=atol, rtol=rtol)
    for expert, vote_BK in zip(mixture.experts, votes.unbind(1), strict=True):
        torch.testing.assert_close(vote_BK, inference.predict(expert, pixels(), COUNT), atol=atol, rtol=rtol)


def test_what_is_no_mixture_is_not_taken_apart() -> None:
    with engine.attack_mode(make_resnet(), "float32") as cheap, pytest.raises(AssertionError, match="mixtures only"):
        cheap.votes()


# ---- predictions


def test_predict_does_not_depend_on_the_batch_size() -> None:
    model = make_resnet()
    whole = inference.predict(model, pixels(), COUNT)
    assert len(set(whole.argmax(1).tolist())) > 1, "a constant classifier proves nothing"
    for batch_size in (1, 3, 7, 64):
        found = inference.predict(model, pixels(), batch_size)
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.argmax(1), whole.argmax(1))


def test_predict_does_not_depend_on_neighbours() -> None:
    """At one batch size not even the rounding may differ: an image alone, and in another order."""
    model = make_resnet()
    whole = inference.predict(model, pixels(), COUNT)
    order = torch.randperm(COUNT, generator=stream("order"))
    torch.testing.assert_close(inference.predict(model, pixels()[order], COUNT), whole[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(inference.predict(model, pixels()[4:5], COUNT), whole[4:5], atol=1e-6, rtol=1e-6)


def test_predict_runs_in_eval_mode_and_puts_the_mode_back() -> None:
    model = make_resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_train_mode = inference.predict(model, pixels(), 7)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(inference.predict(model.eval(), pixels(), 7), in_train_mode)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()), in_train_mode, atol=1e-4, rtol=1e-4)


def test_predict_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        inference.predict(make_resnet(), pixels()[:0], 4)


# ---- one batch attacked


every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_ball = pytest.mark.parametrize("ball", [LInf(0.15), L2(0.8)], ids=["linf", "l2"])
every_attack = pytest.mark.parametrize("settings", [FGSM, PGD], ids=["fgsm", "pgd"])


def struck(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ball: Ball,
    *,
    settings: AnyAttack = PGD,
    craft: AttackFn | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    passes: PassCount | None = None,
) -> AttackResult:
    draws = ImageDraws(seed, "strike", torch.arange(len(images_BCHW)))
    attack = craft or registry.bind(settings, {})
    return engine.run_attack(
        model, images_BCHW, labels_B, attack, ball=ball, draws=draws, precision=precision, passes=passes
    )


def norm_of(change_BCHW: Tensor, ball: Ball) -> Tensor:
    order = torch.inf if isinstance(ball, LInf) else 2
    length_B: Tensor = torch.linalg.vector_norm(change_BCHW.double().flatten(1), order, dim=1)
    return length_B


def is_inside(found: Tensor, images: Tensor, ball: Ball) -> bool:
    in_ball = (norm_of(found.double() - images.double(), ball) <= ball.epsilon + 1e-6).all()
    return bool(in_ball and (found >= 0).all() and (found <= 1).all())


@every_attack
@every_precision
@every_ball
def test_strike_stays_inside_and_moves_every_image(settings: AnyAttack, precision: Precision, ball: Ball) -> None:
    model = make_resnet()
    found = struck(model, pixels(), decisions(model, pixels()), ball, settings=settings, precision=precision)
    assert is_inside(found.images, pixels(), ball)
    assert not found.images.requires_grad
    assert (norm_of(found.images - pixels(), ball) > 0).all()
    assert (found.overshoot < 1e-6).all()


def test_strike_is_repeatable_and_its_start_follows_the_draws() -> None:
    model = make_resnet()
    labels = decisions(model, pixels())
    first = struck(model, pixels(), labels, LInf(0.1)).images
    assert torch.equal(struck(model, pixels(), labels, LInf(0.1)).images, first)
    assert not torch.equal(struck(model, pixels(), labels, LInf(0.1), seed=1).images, first)


def test_stronger_strike_leaves_fewer_correct() -> None:
    model = make_resnet()
    labels = decisions(model, pixels())
    struck_at = [struck(model, pixels(), labels, LInf(epsilon)).images for epsilon in (0.0, 0.03, 0.1, 0.3)]
    left = [int((decisions(model, images) == labels).sum()) for images in struck_at]
    assert left[0] == COUNT
    assert left == sorted(left, reverse=True)
    assert left[-1] < COUNT / 2


class TwoFaced(nn.Module):
    """Sure of class 0 in float32, of class 1 under autocast: what an attack sees there must not count."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        side = -1.0 if torch.is_autocast_enabled("cpu") else 1.0
        score_B = side * (5 + images_BCHW.flatten(1).mean(1))
        return torch.stack([score_B, torch.zeros_like(score_B)], dim=1)


def test_pgd_goes_on_until_float32_agrees() -> None:
    """Retired at the first point that bfloat16 gets wrong, the images would be the random starts, inside the ball."""
    labels = torch.zeros(COUNT, dtype=torch.long)
    with engine.attack_mode(TwoFaced(), "bfloat16") as cheap:
        assert (cheap(pixels()).argmax(1) == 1).all()  # the attack believes that it has won
    long = PGD.model_copy(update={"steps": 10})
    found = struck(TwoFaced(), pixels(), labels, LInf(0.01), settings=long, precision="bfloat16")
    change = (found.images - pixels()).abs()
    # all steps go one way on this model, so nearly every pixel that the box does not hold has reached the wall
    assert (change > 0.0099).double().mean() > 0.9


@dataclass
class Asking:
    """An attack that only asks: what the verdict on the clean images is, under labels of its choice."""

    shift: int
    answers: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        /,
        *,
        ball: Ball,
        draws: Draws,
        fooled: IsAdversarial | None = None,
    ) -> Tensor:
        del model, ball, draws
        assert fooled is not None
        assert fooled(images[:0], labels[:0]).shape == (0,)
        self.answers.append(fooled(images, (labels + self.shift) % CLASSES))
        return images


@pytest.mark.parametrize("shift", [0, 1])
def test_the_verdict_is_that_of_a_float32_forward_pass(shift: int) -> None:
    model, passes, asking = make_resnet().train(), PassCount(), Asking(shift)
    labels = torch.arange(COUNT) % CLASSES
    struck(model, pixels(), labels, LInf(0.1), craft=asking, precision="bfloat16", passes=passes)
    assert torch.equal(asking.answers[0], decisions(model, pixels()) != (labels + shift) % CLASSES)
    assert passes == PassCount(forward=COUNT)  # a verdict is a pass too
    with torch.no_grad():
        assert torch.equal(asking.answers[0], model.eval()(pixels()).argmax(1) != (labels + shift) % CLASSES)


def test_an_image_leaves_at_its_first_point_that_float32_gets_wrong() -> None:
    """With labels that are all wrong, PGD has won before its first step and returns its random starts."""
    model = make_resnet()
    labels = (decisions(model, pixels()) + 1) % CLASSES
    passes = PassCount()
    found = struck(model, pixels(), labels, LInf(1e-4), passes=passes).images
    draws = ImageDraws(0, "strike", torch.arange(COUNT))
    assert torch.equal(found, LInf(1e-4).start(pixels(), draws))
    assert passes == PassCount(forward=2 * COUNT, backward=COUNT)


def outside(
    model: Model, images: Tensor, labels: Tensor, /, *, ball: Ball, draws: Draws, fooled: IsAdversarial | None = None
) -> Tensor:
    """Planted: far outside ball and box."""
    del model, labels, ball, draws, fooled
    return 1 - 2 * images


def in_place(
    model: Model, images: Tensor, labels: Tensor, /, *, ball: Ball, draws: Draws, fooled: IsAdversarial | None = None
) -> Tensor:
    """Planted: the same, and what it was given is overwritten, so that nothing seems to have moved."""
    images.copy_(outside(model, images, labels, ball=ball, draws=draws, fooled=fooled))
    labels.zero_()
    return images


@pytest.mark.parametrize("craft", [outside, in_place])
@every_ball
def test_a_cheating_attack_is_brought_back_and_found_out(craft: AttackFn, ball: Ball) -> None:
    images, labels = pixels(), torch.arange(COUNT) % CLASSES
    found = struck(make_resnet(), images, labels, ball, craft=craft)
    assert torch.equal(images, pixels())
    assert torch.equal(labels, torch.arange(COUNT) % CLASSES)
    assert is_inside(found.images, pixels(), ball)
    torch.testing.assert_close(found.images, ball.project(1 - 2 * pixels(), pixels()))
    expected = (1 - 2 * pixels() - found.images).abs().amax(dim=(1, 2, 3))
    torch.testing.assert_close(found.overshoot, expected)
    assert (found.overshoot > 0.5).any()


@every_attack
def test_passes_of_a_strike_are_those_of_its_steps(settings: AnyAttack) -> None:
    """On a model that nothing fools: every step once forward and once back, and one verdict at the end of PGD."""
    passes, labels = PassCount(), torch.zeros(COUNT, dtype=torch.long)
    struck(TwoFaced(), pixels(), labels, LInf(0.1), settings=settings, passes=passes)
    expected = {"fgsm": PassCount(COUNT, COUNT), "pgd": PassCount((PGD.steps + 1) * COUNT, PGD.steps * COUNT)}
    assert passes == expected[settings.kind]


# ---- context managers


def test_autocast_casts_only_when_asked() -> None:
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with inference.autocast(torch.device("cpu"), "float32"):
        assert (left @ right).dtype == torch.float32
    with inference.autocast(torch.device("cpu"), "bfloat16"):
        assert (left @ right).dtype == torch.bfloat16


def test_frozen_spares_parameters_that_did_not_learn_before() -> None:
    model = make_resnet()
    model.classify.weight.requires_grad_(False)
    with inference.eval_mode(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.classify.weight.requires_grad
    assert model.classify.bias.requires_grad


# ---- compiled


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine compiles what attacks differentiate."""
    monkeypatch.setenv("ADVMOE_COMPILE", "1")
    machine.machine.cache_clear()
    yield
    torch._dynamo.reset()


def lines() -> nn.Module:
    """Quickly compiled."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    with engine.attack_mode(model, "float32") as cheap:
        leaf = images.clone().requires_grad_(True)
        logits = cheap(leaf)
        return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), leaf)[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_network_is_attacked_as_any_other(request: pytest.FixtureRequest) -> None:
    images, model = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), lines()
    plain = [gradient(model, part) for part in (images, images[:2])]
    request.getfixturevalue("compiling")
    torch._dynamo.utils.counters.clear()
    compiled = [gradient(model, part) for part in (images, images[:2])]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for found, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("compiling")
def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(fails, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda _: fails)
    with pytest.raises(UserError, match=r"^environment: ADVMOE_COMPILE is set, but PyTorch cannot compile here \("):
        gradient(lines(), torch.rand(2, 1, 8, 8))

"""The attack engine: it leaves the model unchanged, and success is decided in float32.

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
from advmoe.attacks.ball import L2, Ball, LInf, RandomStream
from advmoe.attacks.engine import AttackResult, PassCount
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.interface import AttackFn, IsAdversarial, Model, input_gradient
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchStream, ImageStreams
from advmoe.attacks.registry import AttackSettings
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


# ---- attacks leave the model as it was


AttackModel = Callable[[nn.Module, Tensor, Tensor], Tensor]


def attacked_in_attack_mode(precision: Precision) -> AttackModel:
    def attack(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        with engine.attack_mode(model, precision) as frozen_model:
            return attacked_in_train_mode(frozen_model, images_BCHW, labels_B)

    return attack


def attacked_in_train_mode(model: Model, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: the classic BatchNorm bug, adversarial batches that pass through the running statistics."""
    draws = BatchStream(stream("craft"))
    return pgd(model, images_BCHW, labels_B, ball=LInf(0.1), settings=PGD, draws=draws)


def attacked_by_run_attack(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    return attacked(model, images_BCHW, labels_B, LInf(0.1), precision="bfloat16").images


def attacked_and_left_in_eval_mode(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: statistics are safe, but the next update would run with them frozen."""
    return attacked_in_train_mode(model.eval(), images_BCHW, labels_B)


def attacked_and_left_frozen(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Planted: a model that can no longer learn."""
    found = attacked_in_attack_mode("float32")(model, images_BCHW, labels_B)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return found


def leaves_the_model_as_it_was(attack: AttackModel, model: nn.Module) -> bool:
    """Weights, BatchNorm statistics, gradients, and every layer's and parameter's own mode."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    images = pixels(8)
    found = attack(model, images, torch.arange(8) % CLASSES)
    assert not torch.equal(found, images), "the attack changed nothing, so nothing was tested"
    return (
        all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        and [module.training for module in model.modules()] == modes
        and [parameter.requires_grad for parameter in model.parameters()] == learning
        and all(parameter.grad is None for parameter in model.parameters())
        and not any(layer.is_folded for layer in model.modules() if isinstance(layer, ConvNorm))
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [make_resnet, make_mixture])
def test_attack_mode_leaves_the_model_as_it_was(make: Callable[[], nn.Module], precision: Precision) -> None:
    assert leaves_the_model_as_it_was(attacked_in_attack_mode(precision), make().train())


@pytest.mark.parametrize("make", [make_resnet, make_mixture])
def test_run_attack_leaves_the_model_as_it_was(make: Callable[[], nn.Module]) -> None:
    assert leaves_the_model_as_it_was(attacked_by_run_attack, make().train())


def test_attack_mode_puts_back_mixed_modes() -> None:
    """Part of the model in eval mode, part of it not to be trained: that is what must come back."""
    mixture = make_mixture().train()
    mixture.experts[0].eval()
    for parameter in mixture.experts[1].parameters():
        parameter.requires_grad_(False)
    assert leaves_the_model_as_it_was(attacked_in_attack_mode("float32"), mixture)
    assert mixture.gate.training
    assert not mixture.experts[0].training


@pytest.mark.parametrize("bug", [attacked_in_train_mode, attacked_and_left_in_eval_mode, attacked_and_left_frozen])
def test_planted_attack_bugs_are_caught(bug: AttackModel) -> None:
    assert not leaves_the_model_as_it_was(bug, make_resnet().train())


def test_attack_mode_puts_the_model_back_after_an_error() -> None:
    model = make_resnet().train()
    with pytest.raises(RuntimeError, match="planted"), engine.attack_mode(model, "float32"):
        raise RuntimeError("planted")
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attack_mode_sees_the_model_in_eval_mode() -> None:
    model = make_resnet().train()
    with engine.attack_mode(model, "float32") as frozen_model, torch.no_grad():
        found = frozen_model(pixels())
    torch.testing.assert_close(found, inference.predict(model, pixels(), COUNT), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(pixels()), found, atol=1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attack_mode_gives_float32_logits_and_no_gradients_for_weights(precision: Precision) -> None:
    with engine.attack_mode(make_resnet(), precision) as frozen_model:
        assert frozen_model(pixels()).dtype == torch.float32
        assert not frozen_model(pixels()).requires_grad
        assert frozen_model(pixels().requires_grad_(True)).requires_grad


def test_attack_mode_does_not_depend_on_the_mode_before() -> None:
    model = make_resnet()
    labels = torch.arange(8) % CLASSES
    trained = attacked_in_attack_mode("float32")(model.train(), pixels(8), labels)
    assert torch.equal(attacked_in_attack_mode("float32")(model.eval(), pixels(8), labels), trained)


# ---- the frozen model of a mixture, and counted passes


def test_passes_are_counted_in_images() -> None:
    passes = PassCount()
    labels = torch.arange(8) % CLASSES
    with engine.attack_mode(make_resnet(), "float32", passes) as frozen_model:
        with torch.no_grad():
            frozen_model(pixels(5))
            frozen_model(pixels(5).requires_grad_(True))  # nothing can flow back from here
        assert passes == PassCount(forward=10, backward=0)
        input_gradient(frozen_model, pixels(8), labels, "ce")
        assert passes == PassCount(forward=18, backward=8)


def test_passes_through_parts_of_a_mixture_are_counted() -> None:
    passes = PassCount()
    with engine.attack_mode(make_mixture(), "float32", passes) as frozen_model, torch.no_grad():
        frozen_model.forward_parts(pixels(3))
        assert passes == PassCount(forward=3)
        for expert_model in frozen_model.expert_models():
            expert_model(pixels(4))
    assert passes == PassCount(forward=11)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_of_a_frozen_mixture_are_those_of_the_mixture(precision: Precision) -> None:
    mixture = make_mixture()
    with engine.attack_mode(mixture, precision) as frozen_model, torch.no_grad():
        assert frozen_model.mixing == "probabilities"
        parts, whole = frozen_model.forward_parts(pixels()), frozen_model(pixels())
        expert_logits = torch.stack([expert_model(pixels()) for expert_model in frozen_model.expert_models()], dim=1)
    assert {part.dtype for part in parts} == {torch.float32}
    atol, rtol = (1e-4, 1e-4) if precision == "float32" else (0.2, 0.1)
    torch.testing.assert_close(parts.log_probs_BK, whole, atol=atol, rtol=rtol)
    torch.testing.assert_close(parts.logits_BEK, expert_logits, atol=atol, rtol=rtol)
    for expert, logits_BK in zip(mixture.experts, expert_logits.unbind(1), strict=True):
        torch.testing.assert_close(logits_BK, inference.predict(expert, pixels(), COUNT), atol=atol, rtol=rtol)


def test_a_single_network_has_no_expert_models() -> None:
    with (
        engine.attack_mode(make_resnet(), "float32") as frozen_model,
        pytest.raises(AssertionError, match="need a mixture"),
    ):
        frozen_model.expert_models()


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


def attacked(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ball: Ball,
    *,
    settings: AttackSettings = PGD,
    attack_fn: AttackFn | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    passes: PassCount | None = None,
) -> AttackResult:
    draws = ImageStreams(seed, "strike", torch.arange(len(images_BCHW)))
    attack = attack_fn or registry.bind(settings, {})
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
def test_run_attack_stays_inside_and_moves_every_image(
    settings: AttackSettings, precision: Precision, ball: Ball
) -> None:
    model = make_resnet()
    found = attacked(model, pixels(), decisions(model, pixels()), ball, settings=settings, precision=precision)
    assert is_inside(found.images, pixels(), ball)
    assert not found.images.requires_grad
    assert (norm_of(found.images - pixels(), ball) > 0).all()
    assert (found.overshoot < 1e-6).all()


def test_run_attack_is_repeatable_and_its_start_follows_the_draws() -> None:
    model = make_resnet()
    labels = decisions(model, pixels())
    first = attacked(model, pixels(), labels, LInf(0.1)).images
    assert torch.equal(attacked(model, pixels(), labels, LInf(0.1)).images, first)
    assert not torch.equal(attacked(model, pixels(), labels, LInf(0.1), seed=1).images, first)


def test_stronger_attack_leaves_fewer_correct() -> None:
    model = make_resnet()
    labels = decisions(model, pixels())
    attacked_at = [attacked(model, pixels(), labels, LInf(epsilon)).images for epsilon in (0.0, 0.03, 0.1, 0.3)]
    left = [int((decisions(model, images) == labels).sum()) for images in attacked_at]
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
    with engine.attack_mode(TwoFaced(), "bfloat16") as frozen_model:
        assert (frozen_model(pixels()).argmax(1) == 1).all()  # the attack believes that it has won
    long = PGD.model_copy(update={"steps": 10})
    found = attacked(TwoFaced(), pixels(), labels, LInf(0.01), settings=long, precision="bfloat16")
    change = (found.images - pixels()).abs()
    # all steps go one way on this model, so nearly every pixel that the box does not hold has reached the wall
    assert (change > 0.0099).double().mean() > 0.9


@dataclass
class RecordsCheck:
    """An attack that records `is_adversarial` on the clean images, with shifted labels."""

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
        draws: RandomStream,
        is_adversarial: IsAdversarial | None = None,
    ) -> Tensor:
        del model, ball, draws
        assert is_adversarial is not None
        assert is_adversarial(images[:0], labels[:0]).shape == (0,)
        self.answers.append(is_adversarial(images, (labels + self.shift) % CLASSES))
        return images


@pytest.mark.parametrize("shift", [0, 1])
def test_is_adversarial_is_a_float32_forward_pass(shift: int) -> None:
    model, passes, records_check = make_resnet().train(), PassCount(), RecordsCheck(shift)
    labels = torch.arange(COUNT) % CLASSES
    attacked(model, pixels(), labels, LInf(0.1), attack_fn=records_check, precision="bfloat16", passes=passes)
    assert torch.equal(records_check.answers[0], decisions(model, pixels()) != (labels + shift) % CLASSES)
    assert passes == PassCount(forward=COUNT)  # a check is a pass too
    with torch.no_grad():
        assert torch.equal(records_check.answers[0], model.eval()(pixels()).argmax(1) != (labels + shift) % CLASSES)


def test_an_image_leaves_at_its_first_point_that_float32_gets_wrong() -> None:
    """With labels that are all wrong, PGD has won before its first step and returns its random starts."""
    model = make_resnet()
    labels = (decisions(model, pixels()) + 1) % CLASSES
    passes = PassCount()
    found = attacked(model, pixels(), labels, LInf(1e-4), passes=passes).images
    draws = ImageStreams(0, "strike", torch.arange(COUNT))
    assert torch.equal(found, LInf(1e-4).start(pixels(), draws))
    assert passes == PassCount(forward=2 * COUNT, backward=COUNT)


def outside(
    model: Model,
    images: Tensor,
    labels: Tensor,
    /,
    *,
    ball: Ball,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Planted: far outside ball and box."""
    del model, labels, ball, draws, is_adversarial
    return 1 - 2 * images


def in_place(
    model: Model,
    images: Tensor,
    labels: Tensor,
    /,
    *,
    ball: Ball,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Planted: the same, and the inputs are overwritten, so that the points seem unchanged."""
    images.copy_(outside(model, images, labels, ball=ball, draws=draws, is_adversarial=is_adversarial))
    labels.zero_()
    return images


@pytest.mark.parametrize("attack_fn", [outside, in_place])
@every_ball
def test_points_outside_the_ball_are_projected_and_reported(attack_fn: AttackFn, ball: Ball) -> None:
    images, labels = pixels(), torch.arange(COUNT) % CLASSES
    found = attacked(make_resnet(), images, labels, ball, attack_fn=attack_fn)
    assert torch.equal(images, pixels())
    assert torch.equal(labels, torch.arange(COUNT) % CLASSES)
    assert is_inside(found.images, pixels(), ball)
    torch.testing.assert_close(found.images, ball.project(1 - 2 * pixels(), pixels()))
    expected = (1 - 2 * pixels() - found.images).abs().amax(dim=(1, 2, 3))
    torch.testing.assert_close(found.overshoot, expected)
    assert (found.overshoot > 0.5).any()


@every_attack
def test_passes_of_an_attack_are_those_of_its_steps(settings: AttackSettings) -> None:
    """On a robust model: every step is one forward and one backward pass, and PGD checks once at the end."""
    passes, labels = PassCount(), torch.zeros(COUNT, dtype=torch.long)
    attacked(TwoFaced(), pixels(), labels, LInf(0.1), settings=settings, passes=passes)
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
    """Enables torch.compile for attacks."""
    monkeypatch.setenv("ADVMOE_COMPILE", "1")
    machine.machine.cache_clear()
    yield
    torch._dynamo.reset()


def lines() -> nn.Module:
    """A network that compiles quickly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    with engine.attack_mode(model, "float32") as frozen_model:
        leaf = images.clone().requires_grad_(True)
        logits = frozen_model(leaf)
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
    with pytest.raises(UserError, match=r"^environment: ADVMOE_COMPILE is set, but torch.compile failed \("):
        gradient(lines(), torch.rand(2, 1, 8, 8))

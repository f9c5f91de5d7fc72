"""Checks 4, 5, 6, 9 and 10: planted faults are reported with their cause, correct models and evaluations pass.

Shapes: N images, B batch, C channel, H/W pixels, E experts, K classes, F features.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.apgd import ApgdCe, ApgdT
from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.custom import Custom
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.interface import Loss
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.registry import AttackSettings
from advmoe.core.artifacts import hash_tensors
from advmoe.evaluation.checks import batch_independence as batch_independence_module
from advmoe.evaluation.checks import binarisation as binarisation_module
from advmoe.evaluation.checks import consistency as consistency_module
from advmoe.evaluation.checks.base import CheckContext, CheckResult, CheckSettings
from advmoe.evaluation.checks.batch_independence import batch_independence
from advmoe.evaluation.checks.binarisation import binarisation
from advmoe.evaluation.checks.consistency import consistency, content_hashes
from advmoe.evaluation.checks.determinism import determinism
from advmoe.evaluation.checks.gradients import gradients, is_probability, low_precision
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget, evaluate
from advmoe.models.gate import Gate
from advmoe.models.mixture import MixtureOfExperts, UniformGate
from advmoe.models.resnet import ResNet18

Check = Callable[[CheckContext], CheckResult]
CHECKS: list[Check] = [gradients, determinism, batch_independence, binarisation, consistency]
CHECK_SETTINGS = CheckSettings(images=20, steps=10, samples=60)
COUNT = 40
SHARED = ROOT.parent / "shared" / "data"


def pgd(loss: Loss = "ce") -> Pgd:
    return Pgd(kind="pgd", steps=10, step_size=0.25, restarts=1, loss=loss, targets=0)


CE: dict[str, AttackSettings] = {"pgd": pgd()}
SUITE: dict[str, AttackSettings] = {
    "fgsm": Fgsm(kind="fgsm"),
    "pgd": pgd(),
    "apgd-ce": ApgdCe(kind="apgd-ce", steps=10, restarts=1),
    "apgd-t": ApgdT(kind="apgd-t", steps=10, targets=2, restarts=1),
    "noise": Noise(kind="noise", draws=3),
}
BLIND: dict[str, AttackSettings] = {"noise": Noise(kind="noise", draws=3)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in an empty folder, where the harness saves its batches."""
    monkeypatch.chdir(tmp_path)


# ---- correct models


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    levels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    return (levels * 255).round() / 255, torch.from_numpy(labels)


def train(make: Callable[[], nn.Module], steps: int, rate: float) -> nn.Module:
    """Returns the network after some full-batch steps on digits that the tests do not use."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    images, labels = (part[400:1000] for part in digits())
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model.train()(images), labels))
        optimizer.step()
    return model.eval()


def resnet(width: int = 3) -> ResNet18:
    return ResNet18(channels=1, classes=10, width=width, mean=(0.3,), std=(0.37,))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_gate() -> Gate:
    """Untrained; its scores are centred on digits, so that each expert gets some of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gate = Gate(channels=1, experts=2, width=2, temperature=1.0, mean=(0.3,), std=(0.37,)).eval()
        nn.init.normal_(gate.score.weight)
    with torch.no_grad():
        gate.score.bias.sub_(gate(digits()[0]).mean(dim=0))
    return gate


def mixture() -> nn.Module:
    return MixtureOfExperts([resnet(2), resnet(2)], make_gate(), "probabilities")


CORRECT_MODELS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "linear": (linear, 60, 0.05),
    "perceptron": (perceptron, 60, 0.02),
    "resnet": (resnet, 20, 0.02),
    "untrained resnet": (resnet, 0, 0.02),
    "mixture": (mixture, 15, 0.02),
}


@cache
def trained(name: str) -> nn.Module:
    return train(*CORRECT_MODELS[name])


def fresh(name: str) -> nn.Module:
    """Returns a new copy for each test."""
    return copy.deepcopy(trained(name))


@pytest.fixture
def plain() -> nn.Module:
    return fresh("perceptron")


def context_of(
    model: nn.Module,
    attacks: Mapping[str, AttackSettings] = CE,
    ball: Ball | None = None,
    training: frozenset[str] | None = None,
) -> CheckContext:
    images, labels = (part[:COUNT] for part in digits())
    target = EvaluationTarget("digits", model, images, labels)
    config = EvaluationConfig(ball or LInf(0.1), seed=0, precision="float32", batch_size=None, drop_fallen=False)
    return CheckContext(target, attacks, evaluate(target, attacks, config), config, CHECK_SETTINGS, training)


@pytest.mark.parametrize(
    ("name", "ball"), [*((name, LInf(0.1)) for name in CORRECT_MODELS), ("linear", L2(0.5)), ("resnet", L2(0.5))]
)
def test_correct_models_fail_no_check(name: str, ball: Ball) -> None:
    context = context_of(fresh(name), SUITE, ball, training=frozenset())
    check_results = [check(context) for check in CHECKS]
    assert [check_result for check_result in check_results if check_result.status in ("warn", "fail")] == []
    if "untrained" not in name:
        assert [check_result for check_result in check_results if check_result.status != "pass"] == []
    json.dumps([check_result.evidence for check_result in check_results], allow_nan=False)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_is_deterministic_and_leaves_everything_as_it_was(check: Check) -> None:
    model = fresh("mixture")
    context = context_of(model)
    parameter = next(model.train().parameters()).requires_grad_(False)
    before, state = hash_tensors(model.state_dict()), torch.random.get_rng_state()
    assert check(context) == check(context)
    assert hash_tensors(model.state_dict()) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not parameter.requires_grad
    assert sum(not each.requires_grad for each in model.parameters()) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def wk_fmnist() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    weights = np.load(SHARED / "checkpoints" / "wk_fmnist_eps0.1.npz", allow_pickle=False)
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    data = np.load(SHARED / "fashion_mnist_test_first200.npz", allow_pickle=False)
    picked = slice(None, None, 2000 // COUNT)
    images, labels = torch.from_numpy(data["images"][picked]), torch.from_numpy(data["labels"][picked])
    return model.eval(), images[:, None].float() / 255, labels.long()


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, networks that are not part of the project")
def test_a_published_network_passes() -> None:
    model, images, labels = wk_fmnist()
    target = EvaluationTarget("fashion", model, images, labels)
    config = EvaluationConfig(LInf(0.1), seed=0, precision="bfloat16", batch_size=None, drop_fallen=True)
    context = CheckContext(target, SUITE, evaluate(target, SUITE, config), config, CHECK_SETTINGS, frozenset())
    assert {check(context).status for check in CHECKS} == {"pass"}


# ---- planted faults


class Wrapped(nn.Module):
    """A network with a function before and a function after it."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda images: images,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


def reports(check_result: CheckResult, status: str, words: str) -> bool:
    return check_result.status == status and words in check_result.sentence


# ---- 4: gradients


def quantised(images: Tensor) -> Tensor:
    return (images * 16).round() / 16


def nan_gradient(images: Tensor) -> Tensor:
    return images + 0 * images.sqrt()


def test_gradients_cut_off_by_rounding_are_named(plain: nn.Module) -> None:
    check_result = gradients(context_of(Wrapped(plain, quantised)))
    assert reports(check_result, "fail", "exactly zero")
    assert "rounding" in check_result.sentence
    assert check_result.evidence["zero_share"] == 1


def test_a_gate_is_not_reported_where_no_gradient_reaches_the_pixels() -> None:
    check_result = gradients(context_of(Wrapped(fresh("mixture"), quantised)))
    assert reports(check_result, "fail", "rounding")
    assert "gate" not in check_result.sentence


def test_a_model_without_any_gradient_is_named(plain: nn.Module) -> None:
    class Closed(Wrapped):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(images)

    assert reports(gradients(context_of(Closed(plain), BLIND)), "fail", "blocks the gradient")


def test_a_gradient_that_cannot_be_computed_is_named(plain: nn.Module) -> None:
    class Unfinished(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: Tensor) -> Tensor:  # noqa: ARG004
            return images.clone()

    check_result = gradients(context_of(Wrapped(plain, Unfinished.apply), BLIND))
    assert reports(check_result, "fail", "cannot be computed")


def test_logits_out_of_scale_are_named(plain: nn.Module) -> None:
    model = Wrapped(plain, after=lambda logits: logits * 1e3)
    check_result = gradients(context_of(model))
    assert reports(check_result, "fail", "the cross-entropy is flat")
    assert check_result.evidence["zero_margin_share"] == 0


@pytest.mark.parametrize("other", [pgd("margin"), SUITE["apgd-t"]])
def test_logits_out_of_scale_are_a_warning_where_an_attack_ignores_scale(
    plain: nn.Module, other: AttackSettings
) -> None:
    model = Wrapped(plain, after=lambda logits: logits * 1e3)
    assert reports(gradients(context_of(model, {**CE, "other": other})), "warn", "other")


def test_nan_gradients_are_named(plain: nn.Module) -> None:
    assert reports(gradients(context_of(Wrapped(plain, nan_gradient), BLIND)), "fail", "NaN or infinite")


def test_softmax_output_is_named(plain: nn.Module) -> None:
    assert reports(gradients(context_of(Wrapped(plain, after=nn.Softmax(dim=1)))), "fail", "softmax output")


def test_log_probabilities_are_logits(plain: nn.Module) -> None:
    assert gradients(context_of(Wrapped(plain, after=nn.LogSoftmax(dim=1)))).status == "pass"


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [False, True])
def test_low_precision_is_named(plain: nn.Module, coarse: torch.dtype, hidden: bool) -> None:
    model = Wrapped(plain, after=lambda logits: logits.to(coarse).float() if hidden else logits.to(coarse))
    check_result = gradients(context_of(model))
    assert reports(check_result, "fail", "runs in low precision")
    assert str(coarse).removeprefix("torch.") in check_result.sentence


def test_what_counts_as_low_precision_and_as_probability() -> None:
    logits = torch.linspace(-1, 1, 30).view(3, 10) / 3
    assert low_precision(logits) is None
    assert low_precision(logits.double()) is None
    assert low_precision(torch.arange(30.0).view(3, 10)) is None  # votes
    assert low_precision(logits.half().float()) == "float16"
    assert is_probability(logits.softmax(1))
    assert not is_probability(logits)
    assert not is_probability(logits.sigmoid())


class Routed(MixtureOfExperts):
    """Its gate's weights, changed on their way to the experts."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__([fresh("resnet"), fresh("untrained resnet")], make_gate(), "probabilities")
        self.change = change

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BEK = torch.stack([expert(images_BCHW) for expert in self.experts], dim=1)
        weights_BE = self.change(self.gate(images_BCHW).exp())
        return (weights_BE[:, :, None] * logits_BEK).sum(dim=1)


def hard(weights_BE: Tensor) -> Tensor:
    return functional.one_hot(weights_BE.argmax(dim=1), weights_BE.shape[1]).float()


@pytest.mark.parametrize("change", [hard, torch.detach], ids=["hard", "detached"])
def test_a_gate_that_is_cut_off_behind_is_named(change: Callable[[Tensor], Tensor]) -> None:
    assert reports(gradients(context_of(Routed(change).eval())), "fail", "gate is not differentiable")


@pytest.mark.parametrize("change", [lambda weights: (hard(weights) - 1) * 9, torch.detach], ids=["hard", "detached"])
def test_a_gate_that_is_cut_off_before_is_named(change: Callable[[Tensor], Tensor]) -> None:
    gate = Wrapped(make_gate(), after=change)
    model = MixtureOfExperts([fresh("resnet"), fresh("untrained resnet")], gate, "probabilities").eval()
    check_result = gradients(context_of(Wrapped(model)))
    assert reports(check_result, "fail", "gate is not differentiable")
    assert "model.gate" in check_result.sentence


@pytest.mark.parametrize("gate", [UniformGate(2), make_gate()], ids=["uniform", "soft"])
def test_gates_that_hide_nothing_pass(gate: nn.Module) -> None:
    model = MixtureOfExperts([fresh("resnet"), fresh("untrained resnet")], gate, "logits").eval()
    assert gradients(context_of(model)).status == "pass"


def test_gradients_need_an_image_that_is_right(plain: nn.Module) -> None:
    context = context_of(plain)
    none_correct = replace(context, result=replace(context.result, labels=context.result.labels + 100))
    assert gradients(none_correct).status == "not checked"


# ---- 5: determinism


def noisy(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn_like(images)


def secretly_noisy(images: Tensor) -> Tensor:
    """Repeated passes agree: the random state is restored."""
    with torch.random.fork_rng():
        return noisy(images)


def gradient_dependent(images: Tensor) -> Tensor:
    """Changes the input if a gradient is computed."""
    return images.flip(3) if images.requires_grad else images


class StubbornDropout(nn.Dropout):
    def train(self, mode: bool = True) -> "StubbornDropout":
        del mode
        return super().train(True)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (noisy, "randomised"),
        (secretly_noisy, "randomised"),
        (gradient_dependent, "behaves differently when gradients are computed"),
    ],
)
def test_non_deterministic_models_are_named(plain: nn.Module, fault: Callable[[Tensor], Tensor], words: str) -> None:
    check_result = determinism(context_of(Wrapped(plain, fault), BLIND))
    assert reports(check_result, "fail", words)
    assert check_result.evidence["largest_change"] > 0


def test_dropout_that_stays_on_is_named(plain: nn.Module) -> None:
    model = nn.Sequential(StubbornDropout(0.5), plain).eval()
    check_result = determinism(context_of(model, BLIND))
    assert reports(check_result, "fail", "dropout is active in eval mode (0)")
    assert "EoT" not in check_result.sentence


def test_rounding_that_does_not_repeat_is_a_warning(plain: nn.Module) -> None:
    calls = iter(range(10**6))
    model = Wrapped(plain, after=lambda logits: logits + 1e-6 * next(calls))
    assert determinism(context_of(model, BLIND)).status == "warn"


# ---- 6: batch independence


def convolutional(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


class StubbornNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "StubbornNorm":
        del mode
        return super().train(True)


class FunctionalNorm(nn.Module):
    """Batch statistics without a BatchNorm module, in any mode."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, hidden: Tensor) -> Tensor:
        mean, variance = (self.running_mean, self.running_var) if self.keeps else (None, None)
        return functional.batch_norm(hidden, mean, variance, training=True)


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (partial(StubbornNorm, 8), "BatchNorm in train mode: 1 uses batch statistics"),
        (partial(nn.BatchNorm2d, 8, track_running_stats=False), "BatchNorm in train mode: 1 uses batch statistics"),
        (partial(FunctionalNorm, keeps=True), "BatchNorm in train mode: an attack changes its running statistics"),
        (partial(FunctionalNorm, keeps=False), "depend on its neighbours"),
    ],
)
def test_batch_norm_in_train_mode_is_named(norm: Callable[[], nn.Module], words: str) -> None:
    model = train(lambda: convolutional(norm()), 25, 0.02)
    context = context_of(model)
    before = hash_tensors(model.state_dict())
    assert reports(batch_independence(context), "fail", words)
    assert hash_tensors(model.state_dict()) == before


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)])
def test_honest_norms_pass(norm: nn.Module) -> None:
    assert batch_independence(context_of(train(lambda: convolutional(norm), 25, 0.02))).status == "pass"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda images: images - images.mean(dim=0), "depend on its neighbours"),
        (lambda images: images * (0.5 + images.mean()), "depend on its neighbours"),
        (lambda images: images.flip(3) if len(images) == 1 else images, "depend on the batch size"),
    ],
)
def test_images_that_depend_on_their_neighbours_are_named(
    plain: nn.Module, fault: Callable[[Tensor], Tensor], words: str
) -> None:
    assert reports(batch_independence(context_of(Wrapped(plain, fault), BLIND)), "fail", words)


def test_batch_independence_of_a_randomised_model_is_not_checked(plain: nn.Module) -> None:
    assert reports(
        batch_independence(context_of(Wrapped(plain, noisy), BLIND)),
        "not checked",
        "logits differ between identical passes",
    )


def test_a_state_that_an_attack_changes_is_a_warning(plain: nn.Module) -> None:
    counter = Counting()
    context = context_of(nn.Sequential(counter, plain))
    before = int(counter.calls)
    assert reports(batch_independence(context), "warn", "buffer of the model: 0.calls")
    assert int(counter.calls) == before


def test_a_model_that_fails_on_some_batches_is_named(plain: nn.Module) -> None:
    def sized(images: Tensor) -> Tensor:
        if len(images) == CHECK_SETTINGS.images:
            raise ValueError("built for another size")
        return images

    assert reports(
        batch_independence(context_of(Wrapped(plain, sized), BLIND)), "fail", "fails on a batch of this check"
    )


def test_flipped_decisions_leave_ties_aside() -> None:
    usual = torch.tensor([[1.0, 1.0 - 1e-6], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[1.0 - 2e-6, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = batch_independence_module._compare(other, usual)
    assert found.flipped == 1
    assert found.is_significant
    assert not batch_independence_module._compare(usual + 1e-6, usual).is_significant


# ---- 9: binarisation

IDLE = "def attack(model, images, labels, *, ball, draws, is_adversarial=None):\n    return images\n"


def own(code: str) -> Custom:
    path = Path("own.py")
    path.write_text(code)
    return Custom(kind="own", function=f"{path}:attack")


def test_an_attack_that_does_nothing_finds_nothing_planted(plain: nn.Module) -> None:
    check_result = binarisation(context_of(plain, {"idle": own(IDLE)}))
    assert reports(check_result, "fail", "the attacks found only 0 of 20")
    assert check_result.evidence["random"] < 0.3


def test_masked_gradients_hide_what_is_planted(plain: nn.Module) -> None:
    check_result = binarisation(context_of(Wrapped(plain, quantised), SUITE))
    assert check_result.status == "fail"
    assert check_result.evidence["score"] < binarisation_module.FAIL_SHARE


def test_gradients_of_the_wrong_sign_hide_what_is_planted(plain: nn.Module) -> None:
    check_result = binarisation(context_of(Wrapped(plain, lambda images: 2 * images.detach() - images), CE))
    assert check_result.status == "fail"


def test_custom_attacks_are_tested_too(plain: nn.Module) -> None:
    code = (
        "from advmoe.attacks.pgd import Pgd, pgd\n"
        "SETTINGS = Pgd(kind='pgd', steps=10, step_size=0.25, restarts=1, loss='ce', targets=0)\n"
        "def attack(*given, **named):\n    return pgd(*given, settings=SETTINGS, **named)\n"
    )
    assert binarisation(context_of(plain, {"mine": own(code)})).status == "pass"


def test_an_attack_that_cannot_take_two_classes_is_passed_over(plain: nn.Module) -> None:
    code = IDLE.replace("    return", "    if model(images).shape[1] != 10: raise ValueError('ten')\n    return")
    check_result = binarisation(context_of(plain, {"picky": own(code), **CE}))
    assert check_result.status == "pass"
    assert check_result.evidence["attacks"] == ["pgd"]
    assert reports(binarisation(context_of(plain, {"picky": own(code)})), "not checked", "ten")


class Votes(nn.Module):
    """Its last layer is not a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores


class Spare(Wrapped):
    """Has a layer that it does not use."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.spare = nn.Linear(3, 10)


def test_binarisation_reports_why_it_was_not_checked(plain: nn.Module) -> None:
    assert reports(binarisation(context_of(plain, BLIND)), "not checked", "no white-box attack")
    assert reports(binarisation(context_of(train(Votes, 20, 0.02))), "not checked", "no linear layer with 10 outputs")
    assert reports(binarisation(context_of(plain, ball=LInf(0.6))), "not checked", "could be planted at")
    assert reports(binarisation(context_of(Spare(train(Votes, 20, 0.02)))), "not checked", "cannot be captured")


def test_a_layer_that_is_not_called_is_ignored(plain: nn.Module) -> None:
    assert binarisation(context_of(Spare(plain))).status == "pass"


def test_features_are_what_all_last_layers_read() -> None:
    model = fresh("mixture")
    heads = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 10]
    images = digits()[0][:5]
    read_BF = binarisation_module.FeatureExtractor(model, heads)(images)
    assert isinstance(model, MixtureOfExperts)
    expected = [expert.get_submodule("").features(images) for expert in model.experts]  # type: ignore[operator]
    torch.testing.assert_close(read_BF, torch.cat(expected, dim=1))


def test_the_plane_lies_at_the_outermost_harmless_point() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner, outer = torch.randn(50, 30).double(), 3 * torch.randn(4, 30).double()
    weights, offset, best = binarisation_module.fit_hyperplane(inner, outer)
    scores, planted = inner @ weights + offset, outer @ weights + offset
    assert float(scores.max()) == pytest.approx(0, abs=1e-9)
    assert planted.argmax() == best
    assert float(planted[best]) > 0
    assert float(planted[best] - scores.min()) == pytest.approx(1)


def test_a_point_inside_the_others_cannot_be_planted() -> None:
    inner = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    weights, offset, best = binarisation_module.fit_hyperplane(inner, torch.full((1, 3), 0.1).double())
    assert float(weights @ torch.full((3,), 0.1).double() + offset) < 0
    assert best == 0


def test_images_whose_balls_touch_are_left_out() -> None:
    images = torch.tensor([0.0, 0.1, 0.5, 0.9]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert binarisation_module._disjoint_balls(images, LInf(0.19)).tolist() == [0, 2, 3]
    assert binarisation_module._disjoint_balls(images, LInf(0.3)).tolist() == [0, 3]
    assert binarisation_module._disjoint_balls(images, L2(0.3)).tolist() == [0, 2, 3]


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_what_is_planted_is_an_adversarial_example_inside_the_ball(plain: nn.Module, ball: Ball) -> None:
    context = context_of(plain, ball=ball)
    rows = torch.arange(20)
    binary, planted = binarisation_module._plant_examples(context, binarisation_module._output_layers(context), rows)
    assert planted.tolist() == rows.tolist()
    points, images = binary.planes.points, context.target.images[rows]
    assert consistency_module.max_violation(points, images, ball) < 1e-6
    assert (binary(points).argmax(1) == 1).all()
    assert (binary(images).argmax(1) == 0).all()


# ---- 10: consistency

SIGN_STEP = """
import torch
def attack(model, images, labels, *, ball, draws, is_adversarial=None):
    pixels = images.clone().requires_grad_(True)
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(model(pixels), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    return images + {move}
"""
BOXLESS = SIGN_STEP.format(move="ball.epsilon * gradient.sign()")
FAITHFUL = BOXLESS.replace(
    "return images + ball.epsilon * gradient.sign()", "return (images + ball.epsilon * gradient.sign()).clamp(0, 1)"
)


def test_an_epsilon_after_normalisation_is_named(plain: nn.Module) -> None:
    code = SIGN_STEP.format(move="0.37 * ball.epsilon * gradient.sign()")
    check_result = consistency(context_of(plain, {"mine": own(code)}))
    assert reports(
        check_result, "fail", "mine uses only 37.0 % of epsilon, as if epsilon were applied after normalisation"
    )


def test_an_epsilon_in_other_units_is_named(plain: nn.Module) -> None:
    code = SIGN_STEP.format(move="ball.epsilon / 0.37 * gradient.sign()")
    check_result = consistency(context_of(plain, {"mine": own(code)}))
    assert reports(check_result, "fail", "mine on")
    assert "its epsilon is in other units (after normalisation?)" in check_result.sentence


def test_an_epsilon_of_its_own_is_named(plain: nn.Module) -> None:
    code = SIGN_STEP.format(move="0.1 * gradient.sign()")
    assert reports(
        consistency(context_of(plain, {"mine": own(code)})), "fail", "at epsilon 0, mine still changes 8 of 8 images"
    )


def test_an_idle_attack_is_named(plain: nn.Module) -> None:
    assert reports(consistency(context_of(plain, {"idle": own(IDLE)})), "fail", "idle changes no pixel")


def test_an_attack_of_ours_without_a_gradient_is_a_warning(plain: nn.Module) -> None:
    context = context_of(Wrapped(plain, quantised), {"fgsm": SUITE["fgsm"]})
    assert reports(consistency(context), "warn", "fgsm changes no pixel: its gradient is zero")


def test_a_faithful_attack_of_the_users_passes(plain: nn.Module) -> None:
    assert consistency(context_of(plain, {"mine": own(FAITHFUL)})).status == "pass"


def test_an_attack_that_only_forgets_the_box_is_a_warning(plain: nn.Module) -> None:
    check_result = consistency(context_of(plain, {"mine": own(BOXLESS)}))
    assert reports(check_result, "warn", "mine on 100.0 % of its images: the attack left [0, 1]")


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_attacks_use_all_of_epsilon(plain: nn.Module, ball: Ball) -> None:
    used = consistency(context_of(plain, SUITE, ball)).evidence["used_of_epsilon"]
    assert used.keys() == ({"pgd", "apgd-ce", "apgd-t"} | ({"fgsm"} if isinstance(ball, LInf) else set()))
    assert all(share > 0.99 for share in used.values())


def test_an_attack_without_survivors_is_not_reported(plain: nn.Module) -> None:
    """No image survived, so the attack did not need more of epsilon."""
    code = SIGN_STEP.format(move="0.4 * ball.epsilon * gradient.sign()")
    context = context_of(plain, {"mine": own(code)}, LInf(0.9))
    assert not context.result.outcomes["mine"].correct.any()
    assert consistency(context).evidence["used_of_epsilon"] == {}


def test_an_attack_that_the_box_stops_is_not_reported(plain: nn.Module) -> None:
    context = context_of(plain, {"pgd": pgd()}, LInf(0.9))
    grey = torch.full_like(context.target.images, 0.5)
    standing = torch.ones(COUNT, dtype=torch.bool)
    stopped = tampered(context, images=grey + 0.5, correct=standing, attacked=standing)
    stopped = replace(stopped, target=replace(context.target, images=grey))
    assert consistency(stopped).evidence["used_of_epsilon"] == {"pgd": 1}


def test_an_attack_whose_result_depends_on_the_batch_is_named(plain: nn.Module) -> None:
    move = "ball.epsilon * gradient.sign() * (1 if len(images) in (8, 35, 36, 37, 38, 39, 40) else -1)"
    check_result = consistency(context_of(plain, {"mine": own(SIGN_STEP.format(move=move))}, LInf(0.3)))
    assert reports(check_result, "fail", "in batches of other sizes")


def test_an_attack_that_fails_on_few_images_is_a_warning(plain: nn.Module) -> None:
    code = FAITHFUL.replace("    return", "    if len(images) < 3: raise ValueError('three')\n    return")
    assert reports(consistency(context_of(plain, {"mine": own(code)})), "warn", "three")


def tampered(context: CheckContext, **changes: object) -> CheckContext:
    outcomes = {name: replace(outcome, **changes) for name, outcome in context.result.outcomes.items()}  # type: ignore[arg-type]
    return replace(context, result=replace(context.result, outcomes=outcomes))


def test_saved_images_outside_ball_or_box_are_named(plain: nn.Module) -> None:
    context = context_of(plain)
    images = context.result.outcomes["pgd"].images
    for wrong in (images + 0.01, images - 0.01, images * torch.nan):
        assert (
            "the saved images of pgd leave the ball or [0, 1]" in consistency(tampered(context, images=wrong)).sentence
        )


def test_saved_images_that_were_not_evaluated_are_named(plain: nn.Module) -> None:
    context = context_of(plain, ball=LInf(0.3))
    assert context.result.outcomes["pgd"].correct.float().mean() < 0.5
    check_result = consistency(tampered(context, images=context.target.images))
    assert "saved images are classified differently on replay (pgd)" in check_result.sentence
    assert check_result.status == "fail"


def test_a_count_that_the_saved_decisions_do_not_support_is_named(plain: nn.Module) -> None:
    context = context_of(plain, ball=LInf(0.3))
    claimed = context.result.outcomes["pgd"].attacked
    assert reports(consistency(tampered(context, correct=claimed)), "fail", "on replay")


def test_a_randomised_model_does_not_replay(plain: nn.Module) -> None:
    model = Wrapped(plain, lambda images: images + 0.5 * torch.randn_like(images))
    assert reports(consistency(context_of(model, BLIND)), "fail", "on replay")


def test_outside_by_is_exact() -> None:
    images, points = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), 0.5)
    points[1, 0, 0, 0] = 0.75
    assert consistency_module.max_violation(points, images, LInf(0.25)) == 0
    assert consistency_module.max_violation(points, images, LInf(0.125)) == 0.125
    assert consistency_module.max_violation(points, images, L2(0.125)) == 0.125
    assert consistency_module.max_violation(points + 0.5, images + 0.5, LInf(1.0)) == 0.25


def test_leaks_are_counted_and_named(plain: nn.Module) -> None:
    hashes = content_hashes((digits()[0] * 255).round().to(torch.uint8))
    training = frozenset(hashes[400:])
    assert consistency(context_of(plain, training=training)).status == "pass"
    assert consistency(context_of(plain, training=training)).evidence["leaked"] == 0
    natural = consistency(context_of(plain, training=training | {hashes[3]}))
    assert reports(natural, "warn", "1 of 40 test images also occur in the training data")
    leaked = consistency(context_of(plain, training=training | set(hashes[:7])))
    assert reports(leaked, "fail", "7 of 40 test images also occur in the training data")


def test_without_training_data_the_leak_is_said_to_be_unchecked(plain: nn.Module) -> None:
    check_result = consistency(context_of(plain))
    assert reports(check_result, "pass", "training images were not available")
    assert check_result.evidence["leaked"] is None


def test_content_hashes_tell_pixels_and_sizes_apart() -> None:
    images = torch.arange(3 * 2 * 4 * 3, dtype=torch.uint8).view(3, 2, 4, 3)
    hashes = content_hashes(images)
    assert len(set(hashes)) == 3
    assert content_hashes(images.clone()[1:]) == hashes[1:]
    assert not set(hashes) & set(content_hashes(images.view(3, 2, 3, 4)))
    assert content_hashes(images.to(memory_format=torch.channels_last)) == hashes

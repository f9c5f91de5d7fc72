"""Checks 4, 5, 6, 9 and 10: planted faults are caught by name, honest models and honest evaluations pass.

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
from advmoe.attacks.registry import AnyAttack
from advmoe.core.artifacts import hash_tensors
from advmoe.evaluation.checks import batch_independence as company
from advmoe.evaluation.checks import binarisation as planting
from advmoe.evaluation.checks import consistency as saved
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Probes
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
PROBES = Probes(images=20, steps=10, samples=60)
COUNT = 40
SHARED = ROOT.parent / "shared" / "data"


def pgd(loss: Loss = "ce") -> Pgd:
    return Pgd(kind="pgd", steps=10, step_size=0.25, restarts=1, loss=loss, targets=0)


CE: dict[str, AnyAttack] = {"pgd": pgd()}
SUITE: dict[str, AnyAttack] = {
    "fgsm": Fgsm(kind="fgsm"),
    "pgd": pgd(),
    "apgd-ce": ApgdCe(kind="apgd-ce", steps=10, restarts=1),
    "apgd-t": ApgdT(kind="apgd-t", steps=10, targets=2, restarts=1),
    "noise": Noise(kind="noise", draws=3),
}
BLIND: dict[str, AnyAttack] = {"noise": Noise(kind="noise", draws=3)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness keeps for resuming goes here."""
    monkeypatch.chdir(tmp_path)


# ---- honest models


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    levels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    return (levels * 255).round() / 255, torch.from_numpy(labels)


def taught(make: Callable[[], nn.Module], steps: int, rate: float) -> nn.Module:
    """The network after some full-batch steps on digits that the cases do not use."""
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
    """Untrained, and not of one mind: its scores are centred on digits, so each expert gets some of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gate = Gate(channels=1, experts=2, width=2, temperature=1.0, mean=(0.3,), std=(0.37,)).eval()
        nn.init.normal_(gate.score.weight)
    with torch.no_grad():
        gate.score.bias.sub_(gate(digits()[0]).mean(dim=0))
    return gate


def mixture() -> nn.Module:
    return MixtureOfExperts([resnet(2), resnet(2)], make_gate(), "probabilities")


HONEST: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "linear": (linear, 60, 0.05),
    "perceptron": (perceptron, 60, 0.02),
    "resnet": (resnet, 20, 0.02),
    "untrained resnet": (resnet, 0, 0.02),
    "mixture": (mixture, 15, 0.02),
}


@cache
def once(name: str) -> nn.Module:
    return taught(*HONEST[name])


def honest(name: str) -> nn.Module:
    """A copy of its own for each test."""
    return copy.deepcopy(once(name))


@pytest.fixture
def plain() -> nn.Module:
    return honest("perceptron")


def case_of(
    model: nn.Module,
    attacks: Mapping[str, AnyAttack] = CE,
    ball: Ball | None = None,
    training: frozenset[str] | None = None,
) -> CheckContext:
    images, labels = (part[:COUNT] for part in digits())
    target = EvaluationTarget("digits", model, images, labels)
    terms = EvaluationConfig(ball or LInf(0.1), seed=0, precision="float32", batch_size=None, drop_fallen=False)
    return CheckContext(target, attacks, evaluate(target, attacks, terms), terms, PROBES, training)


@pytest.mark.parametrize(
    ("name", "ball"), [*((name, LInf(0.1)) for name in HONEST), ("linear", L2(0.5)), ("resnet", L2(0.5))]
)
def test_honest_models_fail_nothing(name: str, ball: Ball) -> None:
    case = case_of(honest(name), SUITE, ball, training=frozenset())
    findings = [check(case) for check in CHECKS]
    assert [finding for finding in findings if finding.status in ("warn", "fail")] == []
    if "untrained" not in name:
        assert [finding for finding in findings if finding.status != "pass"] == []
    json.dumps([finding.evidence for finding in findings], allow_nan=False)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_says_the_same_twice_and_leaves_everything_as_it_was(check: Check) -> None:
    model = honest("mixture")
    case = case_of(model)
    parameter = next(model.train().parameters()).requires_grad_(False)
    before, state = hash_tensors(model.state_dict()), torch.random.get_rng_state()
    assert check(case) == check(case)
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


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, real networks that are not part of the project")
def test_a_network_of_others_passes() -> None:
    model, images, labels = wk_fmnist()
    target = EvaluationTarget("fashion", model, images, labels)
    terms = EvaluationConfig(LInf(0.1), seed=0, precision="bfloat16", batch_size=None, drop_fallen=True)
    case = CheckContext(target, SUITE, evaluate(target, SUITE, terms), terms, PROBES, frozenset())
    assert {check(case).status for check in CHECKS} == {"pass"}


# ---- planted faults


class Wrapped(nn.Module):
    """Something before the network, something after it."""

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


def says(finding: CheckResult, status: str, words: str) -> bool:
    return finding.status == status and words in finding.sentence


# ---- 4: gradients


def quantised(images: Tensor) -> Tensor:
    return (images * 16).round() / 16


def nan_gradient(images: Tensor) -> Tensor:
    return images + 0 * images.sqrt()


def test_gradients_cut_off_by_rounding_are_named(plain: nn.Module) -> None:
    finding = gradients(case_of(Wrapped(plain, quantised)))
    assert says(finding, "fail", "exactly zero")
    assert "rounding" in finding.sentence
    assert finding.evidence["zero_share"] == 1


def test_a_gate_is_not_blamed_for_pixels_that_reach_nothing() -> None:
    finding = gradients(case_of(Wrapped(honest("mixture"), quantised)))
    assert says(finding, "fail", "rounding")
    assert "gate" not in finding.sentence


def test_a_model_without_any_gradient_is_named(plain: nn.Module) -> None:
    class Closed(Wrapped):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(images)

    assert says(gradients(case_of(Closed(plain), BLIND)), "fail", "cuts the gradient off")


def test_a_gradient_that_cannot_be_computed_is_named(plain: nn.Module) -> None:
    class Unfinished(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: Tensor) -> Tensor:  # noqa: ARG004
            return images.clone()

    finding = gradients(case_of(Wrapped(plain, Unfinished.apply), BLIND))
    assert says(finding, "fail", "cannot be computed")


def test_logits_out_of_scale_are_named(plain: nn.Module) -> None:
    model = Wrapped(plain, after=lambda logits: logits * 1e3)
    finding = gradients(case_of(model))
    assert says(finding, "fail", "the cross-entropy is flat")
    assert finding.evidence["zero_margin_share"] == 0


@pytest.mark.parametrize("other", [pgd("margin"), SUITE["apgd-t"]])
def test_logits_out_of_scale_are_forgiven_where_an_attack_ignores_scale(plain: nn.Module, other: AnyAttack) -> None:
    model = Wrapped(plain, after=lambda logits: logits * 1e3)
    assert says(gradients(case_of(model, {**CE, "other": other})), "warn", "other")


def test_nan_gradients_are_named(plain: nn.Module) -> None:
    assert says(gradients(case_of(Wrapped(plain, nan_gradient), BLIND)), "fail", "NaN or infinite")


def test_softmax_output_is_named(plain: nn.Module) -> None:
    assert says(gradients(case_of(Wrapped(plain, after=nn.Softmax(dim=1)))), "fail", "softmax output")


def test_log_probabilities_are_logits(plain: nn.Module) -> None:
    assert gradients(case_of(Wrapped(plain, after=nn.LogSoftmax(dim=1)))).status == "pass"


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [False, True])
def test_low_precision_is_named(plain: nn.Module, coarse: torch.dtype, hidden: bool) -> None:
    model = Wrapped(plain, after=lambda logits: logits.to(coarse).float() if hidden else logits.to(coarse))
    finding = gradients(case_of(model))
    assert says(finding, "fail", "decides in low precision")
    assert str(coarse).removeprefix("torch.") in finding.sentence


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
        super().__init__([honest("resnet"), honest("untrained resnet")], make_gate(), "probabilities")
        self.change = change

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BEK = torch.stack([expert(images_BCHW) for expert in self.experts], dim=1)
        weights_BE = self.change(self.gate(images_BCHW).exp())
        return (weights_BE[:, :, None] * logits_BEK).sum(dim=1)


def hard(weights_BE: Tensor) -> Tensor:
    return functional.one_hot(weights_BE.argmax(dim=1), weights_BE.shape[1]).float()


@pytest.mark.parametrize("change", [hard, torch.detach], ids=["hard", "detached"])
def test_a_gate_that_is_cut_off_behind_is_named(change: Callable[[Tensor], Tensor]) -> None:
    assert says(gradients(case_of(Routed(change).eval())), "fail", "gate is not differentiable")


@pytest.mark.parametrize("change", [lambda weights: (hard(weights) - 1) * 9, torch.detach], ids=["hard", "detached"])
def test_a_gate_that_is_cut_off_before_is_named(change: Callable[[Tensor], Tensor]) -> None:
    gate = Wrapped(make_gate(), after=change)
    model = MixtureOfExperts([honest("resnet"), honest("untrained resnet")], gate, "probabilities").eval()
    finding = gradients(case_of(Wrapped(model)))
    assert says(finding, "fail", "gate is not differentiable")
    assert "model.gate" in finding.sentence


@pytest.mark.parametrize("gate", [UniformGate(2), make_gate()], ids=["uniform", "soft"])
def test_gates_that_hide_nothing_pass(gate: nn.Module) -> None:
    model = MixtureOfExperts([honest("resnet"), honest("untrained resnet")], gate, "logits").eval()
    assert gradients(case_of(model)).status == "pass"


def test_gradients_need_an_image_that_is_right(plain: nn.Module) -> None:
    case = case_of(plain)
    nobody = replace(case, measured=replace(case.measured, labels=case.measured.labels + 100))
    assert gradients(nobody).status == "not checked"


# ---- 5: determinism


def noisy(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn_like(images)


def secretly_noisy(images: Tensor) -> Tensor:
    """Two passes in a row agree: the generator is put back as it was."""
    with torch.random.fork_rng():
        return noisy(images)


def alert(images: Tensor) -> Tensor:
    """Another network for whoever asks for a gradient."""
    return images.flip(3) if images.requires_grad else images


class StubbornDropout(nn.Dropout):
    def train(self, mode: bool = True) -> "StubbornDropout":
        del mode
        return super().train(True)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(noisy, "randomised"), (secretly_noisy, "randomised"), (alert, "notices that it is attacked")],
)
def test_models_that_change_their_mind_are_named(
    plain: nn.Module, fault: Callable[[Tensor], Tensor], words: str
) -> None:
    finding = determinism(case_of(Wrapped(plain, fault), BLIND))
    assert says(finding, "fail", words)
    assert finding.evidence["largest_change"] > 0


def test_dropout_that_stays_on_is_named(plain: nn.Module) -> None:
    model = nn.Sequential(StubbornDropout(0.5), plain).eval()
    finding = determinism(case_of(model, BLIND))
    assert says(finding, "fail", "dropout stays on in eval mode (0)")
    assert "EoT" not in finding.sentence


def test_rounding_that_does_not_repeat_is_a_warning(plain: nn.Module) -> None:
    calls = iter(range(10**6))
    model = Wrapped(plain, after=lambda logits: logits + 1e-6 * next(calls))
    assert determinism(case_of(model, BLIND)).status == "warn"


# ---- 6: isolation


def convolutional(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


class StubbornNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "StubbornNorm":
        del mode
        return super().train(True)


class FunctionalNorm(nn.Module):
    """Batch statistics by hand, in any mode; there is no BatchNorm to be found."""

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
        (partial(StubbornNorm, 8), "BatchNorm in train mode: 1 takes its statistics"),
        (partial(nn.BatchNorm2d, 8, track_running_stats=False), "BatchNorm in train mode: 1 takes its statistics"),
        (partial(FunctionalNorm, keeps=True), "BatchNorm in train mode: an attack moves its running statistics"),
        (partial(FunctionalNorm, keeps=False), "depend on its neighbours"),
    ],
)
def test_batch_norm_in_train_mode_is_named(norm: Callable[[], nn.Module], words: str) -> None:
    model = taught(lambda: convolutional(norm()), 25, 0.02)
    case = case_of(model)
    before = hash_tensors(model.state_dict())
    assert says(batch_independence(case), "fail", words)
    assert hash_tensors(model.state_dict()) == before


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)])
def test_honest_norms_pass(norm: nn.Module) -> None:
    assert batch_independence(case_of(taught(lambda: convolutional(norm), 25, 0.02))).status == "pass"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda images: images - images.mean(dim=0), "depend on its neighbours"),
        (lambda images: images * (0.5 + images.mean()), "depend on its neighbours"),
        (lambda images: images.flip(3) if len(images) == 1 else images, "how many images come along"),
    ],
)
def test_images_that_depend_on_company_are_named(
    plain: nn.Module, fault: Callable[[Tensor], Tensor], words: str
) -> None:
    assert says(batch_independence(case_of(Wrapped(plain, fault), BLIND)), "fail", words)


def test_a_randomised_model_is_not_accused_of_minding_its_company(plain: nn.Module) -> None:
    assert says(batch_independence(case_of(Wrapped(plain, noisy), BLIND)), "not checked", "otherwise each time")


def test_a_state_that_an_attack_changes_is_a_warning(plain: nn.Module) -> None:
    counter = Counting()
    case = case_of(nn.Sequential(counter, plain))
    before = int(counter.calls)
    assert says(batch_independence(case), "warn", "buffer 0.calls")
    assert int(counter.calls) == before


def test_a_model_that_fails_on_some_batches_is_named(plain: nn.Module) -> None:
    def sized(images: Tensor) -> Tensor:
        if len(images) == PROBES.images:
            raise ValueError("built for another size")
        return images

    assert says(
        batch_independence(case_of(Wrapped(plain, sized), BLIND)), "fail", "fails on a batch that the checks make"
    )


def test_flipped_decisions_leave_ties_aside() -> None:
    usual = torch.tensor([[1.0, 1.0 - 1e-6], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[1.0 - 2e-6, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = company._compare(other, usual)
    assert found.flipped == 1
    assert found.matters
    assert not company._compare(usual + 1e-6, usual).matters


# ---- 9: binarisation

IDLE = "def attack(model, images, labels, *, ball, draws, fooled=None):\n    return images\n"


def own(code: str) -> Custom:
    path = Path("own.py")
    path.write_text(code)
    return Custom(kind="own", function=f"{path}:attack")


def test_an_attack_that_does_nothing_finds_nothing_planted(plain: nn.Module) -> None:
    finding = binarisation(case_of(plain, {"idle": own(IDLE)}))
    assert says(finding, "fail", "the attacks found only 0 of 20")
    assert finding.evidence["random"] < 0.3


def test_masked_gradients_hide_what_is_planted(plain: nn.Module) -> None:
    finding = binarisation(case_of(Wrapped(plain, quantised), SUITE))
    assert finding.status == "fail"
    assert finding.evidence["score"] < planting.POOR


def test_gradients_of_the_wrong_sign_hide_what_is_planted(plain: nn.Module) -> None:
    finding = binarisation(case_of(Wrapped(plain, lambda images: 2 * images.detach() - images), CE))
    assert finding.status == "fail"


def test_own_attacks_are_put_to_the_test_too(plain: nn.Module) -> None:
    code = (
        "from advmoe.attacks.pgd import Pgd, pgd\n"
        "SETTINGS = Pgd(kind='pgd', steps=10, step_size=0.25, restarts=1, loss='ce', targets=0)\n"
        "def attack(*given, **named):\n    return pgd(*given, settings=SETTINGS, **named)\n"
    )
    assert binarisation(case_of(plain, {"mine": own(code)})).status == "pass"


def test_an_attack_that_cannot_take_two_classes_is_passed_over(plain: nn.Module) -> None:
    code = IDLE.replace("    return", "    if model(images).shape[1] != 10: raise ValueError('ten')\n    return")
    finding = binarisation(case_of(plain, {"picky": own(code), **CE}))
    assert finding.status == "pass"
    assert finding.evidence["attacks"] == ["pgd"]
    assert says(binarisation(case_of(plain, {"picky": own(code)})), "not checked", "ten")


class Votes(nn.Module):
    """Its last layer is no Linear."""

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


def test_binarisation_says_why_it_was_not_made(plain: nn.Module) -> None:
    assert says(binarisation(case_of(plain, BLIND)), "not checked", "no white-box attack")
    assert says(binarisation(case_of(taught(Votes, 20, 0.02))), "not checked", "no linear layer with 10 outputs")
    assert says(binarisation(case_of(plain, ball=LInf(0.6))), "not checked", "could be planted at")
    assert says(binarisation(case_of(Spare(taught(Votes, 20, 0.02)))), "not checked", "cannot be read")


def test_a_layer_that_is_not_called_is_no_matter(plain: nn.Module) -> None:
    assert binarisation(case_of(Spare(plain))).status == "pass"


def test_features_are_what_all_last_layers_read() -> None:
    model = honest("mixture")
    heads = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 10]
    images = digits()[0][:5]
    read_BF = planting.Reader(model, heads)(images)
    assert isinstance(model, MixtureOfExperts)
    expected = [expert.get_submodule("").features(images) for expert in model.experts]  # type: ignore[operator]
    torch.testing.assert_close(read_BF, torch.cat(expected, dim=1))


def test_the_plane_lies_at_the_outermost_harmless_point() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner, outer = torch.randn(50, 30).double(), 3 * torch.randn(4, 30).double()
    weights, offset, best = planting.separate(inner, outer)
    scores, planted = inner @ weights + offset, outer @ weights + offset
    assert float(scores.max()) == pytest.approx(0, abs=1e-9)
    assert planted.argmax() == best
    assert float(planted[best]) > 0
    assert float(planted[best] - scores.min()) == pytest.approx(1)


def test_a_point_inside_the_others_cannot_be_planted() -> None:
    inner = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    weights, offset, best = planting.separate(inner, torch.full((1, 3), 0.1).double())
    assert float(weights @ torch.full((3,), 0.1).double() + offset) < 0
    assert best == 0


def test_images_whose_balls_touch_are_left_out() -> None:
    images = torch.tensor([0.0, 0.1, 0.5, 0.9]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert planting._apart(images, LInf(0.19)).tolist() == [0, 2, 3]
    assert planting._apart(images, LInf(0.3)).tolist() == [0, 3]
    assert planting._apart(images, L2(0.3)).tolist() == [0, 2, 3]


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_what_is_planted_is_an_adversarial_example_inside_the_ball(plain: nn.Module, ball: Ball) -> None:
    case = case_of(plain, ball=ball)
    rows = torch.arange(20)
    binary, planted = planting._plant(case, planting._heads(case), rows)
    assert planted.tolist() == rows.tolist()
    points, images = binary.planes.points, case.target.images[rows]
    assert saved.outside_by(points, images, ball) < 1e-6
    assert (binary(points).argmax(1) == 1).all()
    assert (binary(images).argmax(1) == 0).all()


# ---- 10: plumbing

SIGN_STEP = """
import torch
def attack(model, images, labels, *, ball, draws, fooled=None):
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
    finding = consistency(case_of(plain, {"mine": own(code)}))
    assert says(finding, "fail", "mine uses only 37.0 % of epsilon, as an epsilon applied after normalisation does")


def test_an_epsilon_in_other_units_is_named(plain: nn.Module) -> None:
    code = SIGN_STEP.format(move="ball.epsilon / 0.37 * gradient.sign()")
    finding = consistency(case_of(plain, {"mine": own(code)}))
    assert says(finding, "fail", "mine on")
    assert "its epsilon is in other units (after normalisation?)" in finding.sentence


def test_an_epsilon_of_its_own_is_named(plain: nn.Module) -> None:
    code = SIGN_STEP.format(move="0.1 * gradient.sign()")
    assert says(
        consistency(case_of(plain, {"mine": own(code)})), "fail", "at epsilon 0, mine still moves 8 of 8 images"
    )


def test_an_idle_attack_is_named(plain: nn.Module) -> None:
    assert says(consistency(case_of(plain, {"idle": own(IDLE)})), "fail", "idle changes nothing")


def test_an_attack_of_ours_without_a_gradient_is_a_warning(plain: nn.Module) -> None:
    case = case_of(Wrapped(plain, quantised), {"fgsm": SUITE["fgsm"]})
    assert says(consistency(case), "warn", "fgsm changes nothing: its gradient is zero")


def test_a_faithful_attack_of_the_users_passes(plain: nn.Module) -> None:
    assert consistency(case_of(plain, {"mine": own(FAITHFUL)})).status == "pass"


def test_an_attack_that_only_forgets_the_box_is_a_warning(plain: nn.Module) -> None:
    finding = consistency(case_of(plain, {"mine": own(BOXLESS)}))
    assert says(finding, "warn", "mine on 100.0 % of its images: the attack left [0, 1]")


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_attacks_use_all_of_epsilon(plain: nn.Module, ball: Ball) -> None:
    used = consistency(case_of(plain, SUITE, ball)).evidence["used_of_epsilon"]
    assert used.keys() == ({"pgd", "apgd-ce", "apgd-t"} | ({"fgsm"} if isinstance(ball, LInf) else set()))
    assert all(share > 0.99 for share in used.values())


def test_an_attack_that_needs_no_more_is_not_blamed(plain: nn.Module) -> None:
    """Everything fell to little: nothing survived that more could have reached."""
    code = SIGN_STEP.format(move="0.4 * ball.epsilon * gradient.sign()")
    case = case_of(plain, {"mine": own(code)}, LInf(0.9))
    assert not case.measured.outcomes["mine"].correct.any()
    assert consistency(case).evidence["used_of_epsilon"] == {}


def test_an_attack_that_the_box_stops_is_not_blamed(plain: nn.Module) -> None:
    case = case_of(plain, {"pgd": pgd()}, LInf(0.9))
    grey = torch.full_like(case.target.images, 0.5)
    standing = torch.ones(COUNT, dtype=torch.bool)
    stopped = tampered(case, images=grey + 0.5, correct=standing, attacked=standing)
    stopped = replace(stopped, target=replace(case.target, images=grey))
    assert consistency(stopped).evidence["used_of_epsilon"] == {"pgd": 1}


def test_an_attack_whose_result_depends_on_the_batch_is_named(plain: nn.Module) -> None:
    move = "ball.epsilon * gradient.sign() * (1 if len(images) in (8, 35, 36, 37, 38, 39, 40) else -1)"
    finding = consistency(case_of(plain, {"mine": own(SIGN_STEP.format(move=move))}, LInf(0.3)))
    assert says(finding, "fail", "in batches of other sizes")


def test_an_attack_that_fails_on_few_images_is_a_warning(plain: nn.Module) -> None:
    code = FAITHFUL.replace("    return", "    if len(images) < 3: raise ValueError('three')\n    return")
    assert says(consistency(case_of(plain, {"mine": own(code)})), "warn", "three")


def tampered(case: CheckContext, **changes: object) -> CheckContext:
    outcomes = {name: replace(outcome, **changes) for name, outcome in case.measured.outcomes.items()}  # type: ignore[arg-type]
    return replace(case, measured=replace(case.measured, outcomes=outcomes))


def test_saved_images_outside_ball_or_box_are_named(plain: nn.Module) -> None:
    case = case_of(plain)
    images = case.measured.outcomes["pgd"].images
    for wrong in (images + 0.01, images - 0.01, images * torch.nan):
        assert "the saved images of pgd leave the ball or [0, 1]" in consistency(tampered(case, images=wrong)).sentence


def test_saved_images_that_were_not_judged_are_named(plain: nn.Module) -> None:
    case = case_of(plain, ball=LInf(0.3))
    assert case.measured.outcomes["pgd"].correct.float().mean() < 0.5
    finding = consistency(tampered(case, images=case.target.images))
    assert "saved images get another decision on replay (pgd)" in finding.sentence
    assert finding.status == "fail"


def test_a_count_that_the_saved_decisions_do_not_support_is_named(plain: nn.Module) -> None:
    case = case_of(plain, ball=LInf(0.3))
    claimed = case.measured.outcomes["pgd"].attacked
    assert says(consistency(tampered(case, correct=claimed)), "fail", "on replay")


def test_a_randomised_model_does_not_replay(plain: nn.Module) -> None:
    model = Wrapped(plain, lambda images: images + 0.5 * torch.randn_like(images))
    assert says(consistency(case_of(model, BLIND)), "fail", "on replay")


def test_outside_by_is_exact() -> None:
    images, points = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), 0.5)
    points[1, 0, 0, 0] = 0.75
    assert saved.outside_by(points, images, LInf(0.25)) == 0
    assert saved.outside_by(points, images, LInf(0.125)) == 0.125
    assert saved.outside_by(points, images, L2(0.125)) == 0.125
    assert saved.outside_by(points + 0.5, images + 0.5, LInf(1.0)) == 0.25


def test_leaks_are_counted_and_named(plain: nn.Module) -> None:
    hashes = content_hashes((digits()[0] * 255).round().to(torch.uint8))
    training = frozenset(hashes[400:])
    assert consistency(case_of(plain, training=training)).status == "pass"
    assert consistency(case_of(plain, training=training)).evidence["leaked"] == 0
    natural = consistency(case_of(plain, training=training | {hashes[3]}))
    assert says(natural, "warn", "1 of 40 test images also occur in the training data")
    leaked = consistency(case_of(plain, training=training | set(hashes[:7])))
    assert says(leaked, "fail", "7 of 40 test images also occur in the training data")


def test_without_training_data_the_leak_is_said_to_be_unchecked(plain: nn.Module) -> None:
    finding = consistency(case_of(plain))
    assert says(finding, "pass", "training images were not at hand")
    assert finding.evidence["leaked"] is None


def test_content_hashes_tell_pixels_and_sizes_apart() -> None:
    images = torch.arange(3 * 2 * 4 * 3, dtype=torch.uint8).view(3, 2, 4, 3)
    hashes = content_hashes(images)
    assert len(set(hashes)) == 3
    assert content_hashes(images.clone()[1:]) == hashes[1:]
    assert not set(hashes) & set(content_hashes(images.view(3, 2, 3, 4)))
    assert content_hashes(images.to(memory_format=torch.channels_last)) == hashes

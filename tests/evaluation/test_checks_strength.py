"""Checks 1, 2, 3, 7 and 8: planted faults are caught by name, honest models and honest evaluations pass.

Shapes: N images, B batch, C channel, H/W pixels, K classes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.apgd import ApgdT
from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.custom import Custom
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.rays import RayS
from advmoe.attacks.registry import AnyAttack
from advmoe.attacks.square import Square
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult, Probes
from advmoe.evaluation.checks.blackbox import blackbox
from advmoe.evaluation.checks.convergence import convergence
from advmoe.evaluation.checks.epsilon_sweep import epsilon_sweep
from advmoe.evaluation.checks.loss_increase import loss_increase
from advmoe.evaluation.checks.pgd_gap import pgd_gap
from advmoe.evaluation.harness import EvaluationConfig, EvaluationResult, EvaluationTarget, Outcome, evaluate

Check = Callable[[CheckContext], CheckResult]
PROBES = Probes(images=30, steps=20, samples=10)
CHECKS: list[Check] = [convergence, epsilon_sweep, blackbox, loss_increase, pgd_gap]
SHARED = ROOT.parent / "shared" / "data"


def pgd(steps: int = 20, step_size: float = 0.25, loss: Any = "ce", targets: int = 0) -> Pgd:
    return Pgd(kind="pgd", steps=steps, step_size=step_size, restarts=1, loss=loss, targets=targets)


FGSM = Fgsm(kind="fgsm")
CE_ONLY: dict[str, AnyAttack] = {"fgsm": FGSM, "pgd": pgd()}
SUITE: dict[str, AnyAttack] = {
    **CE_ONLY,
    "apgd-t": ApgdT(kind="apgd-t", steps=10, targets=3, restarts=1),
    "square": Square(kind="square", queries=60, p_init=0.8),
    "noise": Noise(kind="noise", draws=5),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness keeps for resuming goes here."""
    monkeypatch.chdir(tmp_path)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


def trained(robust: bool = False) -> nn.Module:
    """A small network that knows digits; `robust`: trained on one step of FGSM."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    images, labels = (part[400:] for part in digits())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        pixels = images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(pixels), labels), pixels)
        seen = (images + 0.1 * robust * gradient.sign()).clamp(0, 1)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(seen), labels))
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return trained()


@pytest.fixture(scope="module")
def sturdy() -> nn.Module:
    return trained(robust=True)


class Wrapped(nn.Module):
    """Planted faults: something before the network, something after it."""

    def __init__(
        self, model: nn.Module, before: Callable[[Tensor], Tensor] | None = None, after: float | None = None
    ) -> None:
        super().__init__()
        self.model, self.before, self.scale = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self.before(images) if self.before else images)
        return logits * self.scale if self.scale else logits


def quantised(images: Tensor) -> Tensor:
    return (images * 15).round() / 15


def is_digit(images: Tensor) -> Tensor:
    """Clean ones have 17 levels of grey."""
    levels = images * 16
    return ((levels - levels.round()).abs() < 1e-4).flatten(1).all(dim=1).view(-1, 1, 1, 1)


def mirage(images: Tensor) -> Tensor:
    """Honest gradients at clean digits; anywhere else they point the wrong way."""
    return torch.where(is_digit(images), images, 2 * images.detach() - images)


def fog(images: Tensor) -> Tensor:
    """No gradient at clean digits; anywhere else it is honest."""
    return torch.where(is_digit(images), images.detach(), images)


def nan_gradient(images: Tensor) -> Tensor:
    return images + 0 * (images * 0).sqrt()


def terms(ball: Ball, *, drop_fallen: bool = False) -> EvaluationConfig:
    return EvaluationConfig(ball, seed=0, precision="float32", batch_size=None, drop_fallen=drop_fallen)


def case_of(
    model: nn.Module, attacks: Mapping[str, AnyAttack] = SUITE, ball: Ball | None = None, *, drop_fallen: bool = False
) -> CheckContext:
    images, labels = (part[:60] for part in digits())
    target = EvaluationTarget("digits", model, images, labels)
    on = terms(ball or LInf(0.1), drop_fallen=drop_fallen)
    return CheckContext(target, attacks, evaluate(target, attacks, on), on, PROBES, None)


def told(
    correct: Mapping[str, list[bool]], attacks: Mapping[str, AnyAttack], *, drop_fallen: bool = False
) -> CheckContext:
    """A case of what is said to have happened, on two classes, all images right when clean; nothing is run."""
    count = len(next(iter(correct.values())))
    labels, images = torch.zeros(count, dtype=torch.long), torch.zeros(count, 1, 1, 1)
    standing, outcomes = torch.ones(count, dtype=torch.bool), {}
    for name, right in correct.items():
        after = standing & torch.tensor(right)
        outcomes[name] = Outcome(standing, after, (~after).long(), images, 0.0, 0, 0, 0.0, count)
        standing = after if drop_fallen else standing
    measured = EvaluationResult(torch.tensor([[1.0, 0.0]]).expand(count, 2), labels, outcomes)
    target = EvaluationTarget("told", nn.Flatten(), images, labels)
    return CheckContext(target, attacks, measured, terms(LInf(0.1), drop_fallen=drop_fallen), PROBES, None)


def only(case: CheckContext, attacks: Mapping[str, AnyAttack]) -> CheckContext:
    """The same evaluation, had it had these attacks only."""
    outcomes = {name: case.measured.outcomes[name] for name in attacks}
    return replace(case, attacks=attacks, measured=replace(case.measured, outcomes=outcomes))


# honest


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize("which", ["plain", "sturdy"])
def test_an_honest_model_passes_every_check(which: str, ball: Ball, request: pytest.FixtureRequest) -> None:
    case = case_of(request.getfixturevalue(which), ball=ball)
    findings = [check(case) for check in CHECKS]
    assert [finding.check for finding in findings] == ["iterations", "budget", "blackbox", "progress", "pgd_gap"]
    statuses = {finding.check: finding.status for finding in findings}
    assert statuses.pop("pgd_gap") in ("pass", "warn")  # a finding about the model, not a fault
    assert set(statuses.values()) == {"pass"}, findings
    assert all(json.loads(json.dumps(finding.evidence)) == finding.evidence for finding in findings)


def test_checks_are_deterministic_and_leave_the_model_alone(plain: nn.Module) -> None:
    model = nn.Sequential(plain, nn.BatchNorm1d(10), nn.Dropout())
    model[1].weight.requires_grad_(False)
    case = case_of(model.eval())
    model.train()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = ([check(case) for check in CHECKS] for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model[1].parameters()] == [False, True]


def test_the_batch_size_changes_no_finding(sturdy: nn.Module) -> None:
    case = case_of(sturdy)
    small = replace(case, terms=replace(case.terms, batch_size=7))
    assert [check(small) for check in (convergence, epsilon_sweep)] == [
        check(case) for check in (convergence, epsilon_sweep)
    ]


# masked gradients


def test_a_saturated_output_fails_where_all_attacks_climb_the_cross_entropy(plain: nn.Module) -> None:
    case = case_of(Wrapped(plain, after=1e4), CE_ONLY)
    enough, rise = epsilon_sweep(case), loss_increase(case)
    assert enough.status == rise.status == "fail"
    assert "saturated" in enough.sentence
    assert "exactly zero" in rise.sentence
    assert "fgsm does nothing" in rise.sentence


def test_a_saturated_output_is_a_warning_where_other_losses_were_climbed(plain: nn.Module) -> None:
    finding = epsilon_sweep(case_of(Wrapped(plain, after=1e4)))
    assert finding.status == "warn"
    assert "saturated" in finding.sentence


def test_a_quantised_input_is_caught_by_name(sturdy: nn.Module) -> None:
    case = case_of(Wrapped(sturdy, before=quantised))
    enough, rise = epsilon_sweep(case), loss_increase(case)
    assert enough.status == rise.status == "fail"
    assert "quantised" in enough.sentence
    assert "100.0 % at epsilon 0.5" in enough.sentence
    assert "exactly zero on 100.0 %" in rise.sentence


def test_gradients_that_are_nan_are_caught_by_name(plain: nn.Module) -> None:
    case = case_of(Wrapped(plain, before=nan_gradient), {"noise": SUITE["noise"]})
    assert epsilon_sweep(case).status == loss_increase(case).status == "fail"
    assert "NaN" in epsilon_sweep(case).sentence
    assert "NaN" in loss_increase(case).sentence


def test_gradients_that_mislead_beyond_the_first_step_are_caught(sturdy: nn.Module) -> None:
    case = case_of(Wrapped(sturdy, before=mirage))
    steps, rise = convergence(case), loss_increase(case)
    assert steps.status == rise.status == "fail"
    assert "one FGSM step leaves 83.3 % standing, PGD 100.0 %" in steps.sentence
    assert "masked gradients" in steps.sentence
    assert "leads nowhere" in rise.sentence


def test_gradients_that_mislead_everywhere_are_caught(plain: nn.Module) -> None:
    finding = epsilon_sweep(case_of(Wrapped(plain, before=lambda images: 2 * images.detach() - images)))
    assert finding.status == "fail"
    assert "% at epsilon 0.5 and" in finding.sentence
    assert "do not lead to the boundary" in finding.sentence


@pytest.mark.parametrize("check", [epsilon_sweep, loss_increase])
def test_a_model_without_gradients_fails(check: Check, plain: nn.Module) -> None:
    finding = check(case_of(Wrapped(plain, before=torch.detach), {"noise": SUITE["noise"]}))
    assert finding.status == "fail"
    assert "exactly zero on 100.0 %" in finding.sentence


def test_accuracy_that_rises_with_epsilon_is_caught(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def risen(
        case: CheckContext, probe: probe_attacks.ProbeSet, attack: AnyAttack, ball: Ball, purpose: str | None
    ) -> Tensor:
        del case, attack, purpose
        standing = {0.05: 10, 0.1: 20, 0.2: 5}.get(ball.epsilon, 0)
        return torch.arange(len(probe.rows)) < standing

    monkeypatch.setattr(probe_attacks, "survivors", risen)
    finding = epsilon_sweep(case_of(plain))
    assert finding.status == "fail"
    assert "rises with epsilon, from 33.3 % (linf 0.05) to 66.7 % (linf 0.1)" in finding.sentence


# models that cannot be asked


@pytest.mark.parametrize("check", [convergence, epsilon_sweep, loss_increase])
def test_a_model_that_raises_is_not_checked(check: Check, plain: nn.Module) -> None:
    def moody(images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise KeyError("no gradients on weekdays")
        return images

    case = case_of(plain)
    finding = check(replace(case, target=replace(case.target, model=Wrapped(plain, before=moody))))
    assert finding.status == "not checked"
    assert "KeyError" in finding.sentence


@pytest.mark.parametrize("check", [convergence, epsilon_sweep, loss_increase])
def test_a_model_that_is_never_right_is_not_checked(check: Check, plain: nn.Module) -> None:
    case = case_of(plain, {"noise": SUITE["noise"]})
    wrong = replace(case.measured, labels=(case.measured.clean_logits.argmax(1) + 1) % 10)
    finding = check(replace(case, measured=wrong))
    assert finding.status == "not checked"
    assert "no clean image" in finding.sentence


def test_a_model_that_sees_one_class_everywhere_is_not_accused(plain: nn.Module) -> None:
    finding = epsilon_sweep(case_of(nn.Sequential(plain, nn.Linear(10, 10).requires_grad_(False).apply(_always_three))))
    assert finding.status == "not checked"
    assert "class 3" in finding.sentence


def _always_three(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    layer.bias.data = functional.one_hot(torch.tensor(3), 10).float()


# 1 iterations: evaluations that are too weak


def test_attacks_that_one_step_outdoes_fail(plain: nn.Module) -> None:
    finding = convergence(case_of(plain, {"pgd": pgd(steps=1, step_size=0.01), "noise": SUITE["noise"]}))
    assert finding.status == "fail"
    assert "one FGSM step fools" in finding.sentence
    assert "more of the images than pgd did" in finding.sentence


def test_attacks_that_a_plain_pgd_outdoes_fail(plain: nn.Module) -> None:
    case = case_of(Wrapped(plain, before=fog), {"fgsm": FGSM})
    finding = convergence(case)
    assert finding.status == "fail"
    assert "a plain PGD of 40 steps fools" in finding.sentence
    assert "than fgsm did: the attacks tried were too weak" in finding.sentence


def test_attacks_are_not_blamed_for_images_they_were_not_to_meet(plain: nn.Module) -> None:
    case = case_of(Wrapped(plain, before=fog), {"fgsm": FGSM})
    outcome = replace(case.measured.outcomes["fgsm"], limit=2)
    finding = convergence(replace(case, measured=replace(case.measured, outcomes={"fgsm": outcome})))
    assert finding.status == "pass"


def test_pgd_that_has_not_converged_is_a_warning_and_no_more(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(
        case: CheckContext, probe: probe_attacks.ProbeSet, attack: AnyAttack, ball: Ball, purpose: str | None
    ) -> Tensor:
        del case, ball, purpose
        return torch.arange(len(probe.rows)) < (20 if attack == pgd(20) else 3 if attack == pgd(40) else 25)

    case = case_of(plain)
    monkeypatch.setattr(probe_attacks, "survivors", slow)
    everything = {name: replace(o, correct=o.correct & False) for name, o in case.measured.outcomes.items()}
    finding = convergence(replace(case, measured=replace(case.measured, outcomes=everything)))
    assert finding.status == "warn"
    assert "takes 56.7 % more of the images: PGD has not converged after 20 steps" in finding.sentence


def test_without_white_box_attacks_only_the_probes_are_compared(plain: nn.Module) -> None:
    finding = convergence(case_of(plain, {"noise": SUITE["noise"]}))
    assert finding.status == "pass"
    assert "white_box" not in finding.evidence


# 3 blackbox


def stands(count: int, *fallen: int) -> list[bool]:
    return [row not in fallen for row in range(count)]


@pytest.mark.parametrize(
    ("images", "added", "status"),
    [(100, 2, "pass"), (100, 3, "warn"), (100, 10, "warn"), (100, 11, "fail"), (1000, 5, "pass"), (1000, 6, "warn")],
)
def test_what_blind_attacks_may_add(images: int, added: int, status: str) -> None:
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": SUITE["square"]}
    right = {"pgd": stands(images, 50, 51), "square": stands(images, *range(added), 50, 51)}
    finding = blackbox(told(right, attacks))
    assert finding.status == status
    assert finding.evidence["added"] == added
    assert ("masked gradients" in finding.sentence) == (status != "pass")


def test_transfer_decisions_and_noise_count_as_blind_and_an_own_attack_as_neither() -> None:
    attacks: dict[str, AnyAttack] = {
        "pgd": pgd(),
        "rays": RayS(kind="rays", queries=1),
        "noise": SUITE["noise"],
        "mine": Custom(kind="own", function="x.py:f"),
    }
    right = {"pgd": stands(50), "rays": stands(50, 0, 1), "noise": stands(50, 2), "mine": stands(50, *range(20))}
    finding = blackbox(told(right, attacks))
    assert finding.status == "warn"
    assert finding.evidence["by"] == {"rays": 2, "noise": 1}


def test_one_step_as_the_only_white_box_attack_is_named() -> None:
    attacks: dict[str, AnyAttack] = {"fgsm": FGSM, "square": SUITE["square"]}
    finding = blackbox(told({"fgsm": stands(50), "square": stands(50, *range(20))}, attacks))
    assert finding.status == "fail"
    assert "one step is too weak" in finding.sentence


@pytest.mark.parametrize("names", [["pgd"], ["square", "noise"]])
def test_without_both_sides_there_is_nothing_to_compare(names: list[str]) -> None:
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": SUITE["square"], "noise": SUITE["noise"]}
    case = told({name: stands(50) for name in names}, {name: attacks[name] for name in names})
    assert blackbox(case).status == "not checked"


def test_an_image_that_white_box_attacks_never_met_is_no_evidence() -> None:
    attacks: dict[str, AnyAttack] = {"square": SUITE["square"], "pgd": pgd()}
    right = {"square": stands(50, *range(20)), "pgd": stands(50)}
    assert blackbox(told(right, attacks)).status == "fail"
    finding = blackbox(told(right, attacks, drop_fallen=True))
    assert finding.status == "not checked"
    assert "but not every white-box attack met them" in finding.sentence


def test_an_image_beyond_a_white_box_attacks_limit_is_no_evidence() -> None:
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": SUITE["square"]}
    case = told({"pgd": stands(50), "square": stands(50, 1, *range(30, 50))}, attacks)
    outcome = case.measured.outcomes["pgd"]
    met = replace(outcome, attacked=torch.arange(50) < 30, limit=30)
    finding = blackbox(replace(case, measured=replace(case.measured, outcomes={**case.measured.outcomes, "pgd": met})))
    assert finding.status == "not checked"
    assert finding.evidence["added"] == 1


def test_later_blind_attacks_add_where_the_fallen_are_dropped() -> None:
    attacks: dict[str, AnyAttack] = {"fgsm": FGSM, "pgd": pgd(), "square": SUITE["square"]}
    right = {"fgsm": stands(50, *range(10)), "pgd": stands(50, *range(20)), "square": stands(50, *range(23))}
    finding = blackbox(told(right, attacks, drop_fallen=True))
    assert finding.status == "warn"
    assert finding.evidence["added"] == 3


# 7 progress


def write_attack(body: str) -> Custom:
    Path("mine.py").write_text(
        f"def attack(model, images, labels, *, ball, draws, fooled=None):\n    {body}\n", encoding="utf-8"
    )
    return Custom(kind="own", function="mine.py:attack")


def test_an_attack_of_the_users_that_does_nothing_fails(plain: nn.Module) -> None:
    finding = loss_increase(case_of(plain, {**SUITE, "mine": write_attack("return images.clone()")}))
    assert finding.status == "fail"
    assert "mine does nothing" in finding.sentence
    assert finding.evidence["idle"] == ["mine"]


def test_an_attack_of_the_users_that_does_something_passes(plain: nn.Module) -> None:
    mine = write_attack("return ball.project(images + ball.epsilon, images)")
    assert loss_increase(case_of(plain, {**SUITE, "mine": mine})).status == "pass"


def test_an_attack_that_finds_no_boundary_in_reach_is_not_idle(plain: nn.Module) -> None:
    gives_up = "moved = 1 - images\n    return moved if ball.epsilon > 0.9 else images"
    finding = loss_increase(case_of(plain, {**SUITE, "mine": write_attack(gives_up)}))
    assert finding.status == "pass"
    assert finding.evidence["idle"] == []


def test_an_idle_attack_is_no_fault_where_nothing_was_left_for_it(plain: nn.Module) -> None:
    attacks: dict[str, AnyAttack] = {**SUITE, "mine": write_attack("return images.clone()")}
    case = case_of(plain, attacks, LInf(0.9), drop_fallen=True)
    assert not case.measured.correct["worst"].any()
    assert loss_increase(case).status == "pass"


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["fgsm", "pgd", "noise"], ["no targeted attack", "adversarial training itself uses"]),
        (["apgd-t", "noise"], ["no untargeted attack"]),
        (["pgd", "square"], ["no targeted attack"]),
    ],
)
def test_a_suite_of_one_kind_is_a_warning(names: list[str], missing: list[str], plain: nn.Module) -> None:
    finding = loss_increase(only(case_of(plain), {name: SUITE[name] for name in names}))
    assert finding.status == "warn"
    assert all(words in finding.sentence for words in missing)
    assert finding.sentence.count(";") == len(missing) - 1


def test_two_classes_need_no_targeted_attack(plain: nn.Module) -> None:
    case = only(case_of(plain), {"pgd": SUITE["pgd"], "square": SUITE["square"]})
    assert loss_increase(case).status == "warn"
    pair = replace(case.measured, clean_logits=torch.eye(2)[case.measured.labels.clamp_max(1)], outcomes={})
    assert loss_increase(replace(case, measured=pair)).status == "pass"


# 8 pgd_gap


def test_a_gap_between_pgd_and_the_worst_case_is_a_warning() -> None:
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": SUITE["square"]}
    right = {"pgd": stands(100, *range(10)), "square": stands(100, *range(16))}
    finding = pgd_gap(told(right, attacks))
    assert finding.status == "warn"
    assert "90.0 % under pgd and 84.0 %" in finding.sentence


def test_a_gap_of_five_points_is_allowed() -> None:
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": SUITE["square"]}
    finding = pgd_gap(told({"pgd": stands(60, *range(10)), "square": stands(60, *range(13))}, attacks))
    assert finding.status == "pass"
    assert finding.evidence["gap"] == 0.05


def test_a_gap_is_that_of_the_images_pgd_was_to_meet() -> None:
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": SUITE["square"]}
    case = told({"pgd": stands(60), "square": stands(60, *range(4), *range(30, 40))}, attacks)
    limited = {**case.measured.outcomes, "pgd": replace(case.measured.outcomes["pgd"], limit=10)}
    finding = pgd_gap(replace(case, measured=replace(case.measured, outcomes=limited)))
    assert finding.evidence["gap"] == 0.4
    assert finding.evidence["worst"] == 0.6


def test_the_pgd_of_the_papers_is_preferred() -> None:
    attacks: dict[str, AnyAttack] = {"aimed": pgd(targets=3), "cw": pgd(loss="margin"), "usual": pgd()}
    assert pgd_gap(told({name: stands(10) for name in attacks}, attacks)).evidence["attack"] == "usual"


def test_without_pgd_there_is_no_gap() -> None:
    assert pgd_gap(told({"fgsm": stands(10)}, {"fgsm": FGSM})).status == "not checked"


def test_images_that_pgd_was_spared_are_attacked_with_it(sturdy: nn.Module) -> None:
    """A large noise drops what a feeble PGD would not have found; a strong PGD would have."""
    strong: dict[str, AnyAttack] = {"apgd-t": SUITE["apgd-t"], "pgd": pgd()}
    feeble: dict[str, AnyAttack] = {"apgd-t": SUITE["apgd-t"], "pgd": pgd(steps=1, step_size=0.01)}
    found = {name: pgd_gap(case_of(sturdy, suite, drop_fallen=True)) for name, suite in _named(strong, feeble)}
    assert found["strong"].status == "pass"
    assert found["feeble"].status == "warn"
    assert found["feeble"].evidence["fallen_before"] > 10


def _named(*suites: dict[str, AnyAttack]) -> list[tuple[str, dict[str, AnyAttack]]]:
    return list(zip(("strong", "feeble"), suites, strict=True))


# somebody else's models


class TradesMnist(nn.Module):
    """The network of the TRADES checkpoint (see its README)."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)]
        linear = [nn.Linear(1024, 200), nn.Linear(200, 200), nn.Linear(200, 10)]
        self.feature_extractor = nn.ModuleDict({f"conv{k}": layer for k, layer in enumerate(convolutions, 1)})
        self.classifier = nn.ModuleDict({f"fc{k}": layer for k, layer in enumerate(linear, 1)})

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for first, second in (("conv1", "conv2"), ("conv3", "conv4")):
            x = self.feature_extractor[second](self.feature_extractor[first](x).relu()).relu()
            x = functional.max_pool2d(x, 2)
        x = x.flatten(1)
        for name in ("fc1", "fc2"):
            x = self.classifier[name](x).relu()
        logits: Tensor = self.classifier["fc3"](x)
        return logits


@pytest.fixture
def trades() -> EvaluationTarget:
    weights = SHARED / "checkpoints" / "trades_mnist_smallcnn.npz"
    if not weights.is_file():
        pytest.skip(f"needs {weights}")
    model = TradesMnist()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in np.load(weights).items()})
    stored = np.load(SHARED / "mnist_test_first200.npz", allow_pickle=False)
    images = torch.from_numpy(stored["images"][:20]).float().unsqueeze(1) / 255
    return EvaluationTarget("trades", model.eval(), images, torch.from_numpy(stored["labels"][:20]))


@pytest.mark.parametrize("check", [convergence, epsilon_sweep, loss_increase])
def test_a_published_robust_model_passes_at_its_own_threat_model(check: Check, trades: EvaluationTarget) -> None:
    attacks = {name: SUITE[name] for name in ("pgd", "apgd-t")}
    on = terms(LInf(0.3))
    finding = check(CheckContext(trades, attacks, evaluate(trades, attacks, on), on, PROBES, None))
    assert finding.status == "pass", finding.sentence


def test_its_masked_gradients_in_l2_are_found(trades: EvaluationTarget) -> None:
    """Trained for L-inf on MNIST, it hides them in L2 (Tramer & Boneh 2019): queries find what PGD does not."""
    attacks: dict[str, AnyAttack] = {"pgd": pgd(), "square": Square(kind="square", queries=300, p_init=0.8)}
    on = terms(L2(2.5))
    finding = blackbox(CheckContext(trades, attacks, evaluate(trades, attacks, on), on, PROBES, None))
    assert finding.status in ("warn", "fail")
    assert "masked gradients" in finding.sentence

"""Checks 1, 2, 3, 7 and 8: planted faults are reported with their cause, correct models and evaluations pass.

Shapes: N images, B batch, C channel, H/W pixels, K classes.
"""

import json
import re
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
from advmoe.attacks.registry import AttackSettings
from advmoe.attacks.square import Square
from advmoe.evaluation.checks import probe_attacks
from advmoe.evaluation.checks.base import CheckContext, CheckResult, CheckSettings
from advmoe.evaluation.checks.blackbox import blackbox
from advmoe.evaluation.checks.convergence import convergence
from advmoe.evaluation.checks.epsilon_sweep import epsilon_sweep
from advmoe.evaluation.checks.loss_increase import loss_increase
from advmoe.evaluation.checks.pgd_gap import pgd_gap
from advmoe.evaluation.harness import AttackOutcome, EvaluationConfig, EvaluationResult, EvaluationTarget, evaluate

Check = Callable[[CheckContext], CheckResult]
CHECK_SETTINGS = CheckSettings(images=30, steps=20, samples=10)
CHECKS: list[Check] = [convergence, epsilon_sweep, blackbox, loss_increase, pgd_gap]
SHARED = ROOT.parent / "shared" / "data"


def pgd(steps: int = 20, step_size: float = 0.25, loss: Any = "ce", targets: int = 0) -> Pgd:
    return Pgd(kind="pgd", steps=steps, step_size=step_size, restarts=1, loss=loss, targets=targets)


FGSM = Fgsm(kind="fgsm")
CE_ONLY: dict[str, AttackSettings] = {"fgsm": FGSM, "pgd": pgd()}
SUITE: dict[str, AttackSettings] = {
    **CE_ONLY,
    "apgd-t": ApgdT(kind="apgd-t", steps=10, targets=3, restarts=1),
    "square": Square(kind="square", queries=60, p_init=0.8),
    "noise": Noise(kind="noise", draws=5),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in an empty folder, where the harness saves its batches."""
    monkeypatch.chdir(tmp_path)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


def trained(robust: bool = False) -> nn.Module:
    """Returns a small network trained on digits; `robust`: adversarially trained on FGSM."""
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
def robust_model() -> nn.Module:
    return trained(robust=True)


class Wrapped(nn.Module):
    """Planted faults: a function before the network, a factor after it."""

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


def misleading_off_data(images: Tensor) -> Tensor:
    """Correct gradients at clean digits, the opposite sign elsewhere."""
    return torch.where(is_digit(images), images, 2 * images.detach() - images)


def masked_on_data(images: Tensor) -> Tensor:
    """No gradient at clean digits, the correct one elsewhere."""
    return torch.where(is_digit(images), images.detach(), images)


def nan_gradient(images: Tensor) -> Tensor:
    return images + 0 * (images * 0).sqrt()


def config(ball: Ball, *, drop_fallen: bool = False) -> EvaluationConfig:
    return EvaluationConfig(ball, seed=0, precision="float32", batch_size=None, drop_fallen=drop_fallen)


def context_of(
    model: nn.Module,
    attacks: Mapping[str, AttackSettings] = SUITE,
    ball: Ball | None = None,
    *,
    drop_fallen: bool = False,
) -> CheckContext:
    images, labels = (part[:60] for part in digits())
    target = EvaluationTarget("digits", model, images, labels)
    on = config(ball or LInf(0.1), drop_fallen=drop_fallen)
    return CheckContext(target, attacks, evaluate(target, attacks, on), on, CHECK_SETTINGS, None)


def given_outcomes(
    correct: Mapping[str, list[bool]], attacks: Mapping[str, AttackSettings], *, drop_fallen: bool = False
) -> CheckContext:
    """Returns a context with given outcomes on two classes, all images correct when clean; nothing is run."""
    count = len(next(iter(correct.values())))
    labels, images = torch.zeros(count, dtype=torch.long), torch.zeros(count, 1, 1, 1)
    standing, outcomes = torch.ones(count, dtype=torch.bool), {}
    for name, right in correct.items():
        after = standing & torch.tensor(right)
        outcomes[name] = AttackOutcome(standing, after, (~after).long(), images, 0.0, 0, 0, 0.0, count)
        standing = after if drop_fallen else standing
    result = EvaluationResult(torch.tensor([[1.0, 0.0]]).expand(count, 2), labels, outcomes)
    target = EvaluationTarget("given", nn.Flatten(), images, labels)
    return CheckContext(target, attacks, result, config(LInf(0.1), drop_fallen=drop_fallen), CHECK_SETTINGS, None)


def only(context: CheckContext, attacks: Mapping[str, AttackSettings]) -> CheckContext:
    """Returns the same evaluation with these attacks only."""
    outcomes = {name: context.result.outcomes[name] for name in attacks}
    return replace(context, attacks=attacks, result=replace(context.result, outcomes=outcomes))


# correct models


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize("which", ["plain", "robust_model"])
def test_a_correct_model_passes_every_check(which: str, ball: Ball, request: pytest.FixtureRequest) -> None:
    context = context_of(request.getfixturevalue(which), ball=ball)
    check_results = [check(context) for check in CHECKS]
    assert [check_result.check for check_result in check_results] == [
        "iterations",
        "budget",
        "blackbox",
        "progress",
        "pgd_gap",
    ]
    statuses = {check_result.check: check_result.status for check_result in check_results}
    assert statuses.pop("pgd_gap") in ("pass", "warn")  # a property of the model, not a fault
    assert set(statuses.values()) == {"pass"}, check_results
    assert all(json.loads(json.dumps(check_result.evidence)) == check_result.evidence for check_result in check_results)


def test_checks_are_deterministic_and_leave_the_model_alone(plain: nn.Module) -> None:
    model = nn.Sequential(plain, nn.BatchNorm1d(10), nn.Dropout())
    model[1].weight.requires_grad_(False)
    context = context_of(model.eval())
    model.train()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = ([check(context) for check in CHECKS] for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model[1].parameters()] == [False, True]


def test_the_batch_size_changes_no_result(robust_model: nn.Module) -> None:
    context = context_of(robust_model)
    small = replace(context, config=replace(context.config, batch_size=7))
    assert [check(small) for check in (convergence, epsilon_sweep)] == [
        check(context) for check in (convergence, epsilon_sweep)
    ]


# masked gradients


def test_a_saturated_output_fails_where_all_attacks_climb_the_cross_entropy(plain: nn.Module) -> None:
    context = context_of(Wrapped(plain, after=1e4), CE_ONLY)
    sweep, rise = epsilon_sweep(context), loss_increase(context)
    assert sweep.status == rise.status == "fail"
    assert "saturated" in sweep.sentence
    assert "exactly zero" in rise.sentence
    assert "fgsm has no effect" in rise.sentence


def test_a_saturated_output_is_a_warning_where_other_losses_were_climbed(plain: nn.Module) -> None:
    check_result = epsilon_sweep(context_of(Wrapped(plain, after=1e4)))
    assert check_result.status == "warn"
    assert "saturated" in check_result.sentence


def test_a_quantised_input_is_caught_by_name(robust_model: nn.Module) -> None:
    context = context_of(Wrapped(robust_model, before=quantised))
    sweep, rise = epsilon_sweep(context), loss_increase(context)
    assert sweep.status == rise.status == "fail"
    assert "quantised" in sweep.sentence
    assert "100.0 % at epsilon 0.5" in sweep.sentence
    assert "exactly zero on 100.0 %" in rise.sentence


def test_gradients_that_are_nan_are_caught_by_name(plain: nn.Module) -> None:
    context = context_of(Wrapped(plain, before=nan_gradient), {"noise": SUITE["noise"]})
    assert epsilon_sweep(context).status == loss_increase(context).status == "fail"
    assert "NaN" in epsilon_sweep(context).sentence
    assert "NaN" in loss_increase(context).sentence


def test_gradients_that_mislead_beyond_the_first_step_are_caught(robust_model: nn.Module) -> None:
    context = context_of(Wrapped(robust_model, before=misleading_off_data))
    steps, rise = convergence(context), loss_increase(context)
    assert steps.status == rise.status == "fail"
    found = re.search(r"accuracy is (\d+\.\d) % under one FGSM step and 100\.0 % under PGD", steps.sentence)
    assert found is not None
    assert float(found[1]) < 90  # its training depends on the machine in the last bits
    assert "masked gradients" in steps.sentence
    assert "the gradient is masked or flat" in rise.sentence


def test_gradients_that_mislead_everywhere_are_caught(plain: nn.Module) -> None:
    check_result = epsilon_sweep(context_of(Wrapped(plain, before=lambda images: 2 * images.detach() - images)))
    assert check_result.status == "fail"
    assert "% at epsilon 0.5 and" in check_result.sentence
    assert "do not lead to the boundary" in check_result.sentence


@pytest.mark.parametrize("check", [epsilon_sweep, loss_increase])
def test_a_model_without_gradients_fails(check: Check, plain: nn.Module) -> None:
    check_result = check(context_of(Wrapped(plain, before=torch.detach), {"noise": SUITE["noise"]}))
    assert check_result.status == "fail"
    assert "exactly zero on 100.0 %" in check_result.sentence


def test_accuracy_that_rises_with_epsilon_is_caught(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def rising(
        context: CheckContext, probe: probe_attacks.ProbeSet, attack: AttackSettings, ball: Ball, purpose: str | None
    ) -> Tensor:
        del context, attack, purpose
        standing = {0.05: 10, 0.1: 20, 0.2: 5}.get(ball.epsilon, 0)
        return torch.arange(len(probe.rows)) < standing

    monkeypatch.setattr(probe_attacks, "survivors", rising)
    check_result = epsilon_sweep(context_of(plain))
    assert check_result.status == "fail"
    assert "rises with epsilon, from 33.3 % (linf 0.05) to 66.7 % (linf 0.1)" in check_result.sentence


# models that raise


@pytest.mark.parametrize("check", [convergence, epsilon_sweep, loss_increase])
def test_a_model_that_raises_is_not_checked(check: Check, plain: nn.Module) -> None:
    def moody(images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise KeyError("no gradients on weekdays")
        return images

    context = context_of(plain)
    check_result = check(replace(context, target=replace(context.target, model=Wrapped(plain, before=moody))))
    assert check_result.status == "not checked"
    assert "KeyError" in check_result.sentence


@pytest.mark.parametrize("check", [convergence, epsilon_sweep, loss_increase])
def test_a_model_that_is_never_right_is_not_checked(check: Check, plain: nn.Module) -> None:
    context = context_of(plain, {"noise": SUITE["noise"]})
    wrong = replace(context.result, labels=(context.result.clean_logits.argmax(1) + 1) % 10)
    check_result = check(replace(context, result=wrong))
    assert check_result.status == "not checked"
    assert "no clean image" in check_result.sentence


def test_a_model_that_predicts_one_class_everywhere_is_not_checked(plain: nn.Module) -> None:
    check_result = epsilon_sweep(
        context_of(nn.Sequential(plain, nn.Linear(10, 10).requires_grad_(False).apply(_always_three)))
    )
    assert check_result.status == "not checked"
    assert "class 3" in check_result.sentence


def _always_three(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    layer.bias.data = functional.one_hot(torch.tensor(3), 10).float()


# 1 convergence: evaluations that are too weak


def test_attacks_that_one_step_outdoes_fail(plain: nn.Module) -> None:
    check_result = convergence(context_of(plain, {"pgd": pgd(steps=1, step_size=0.01), "noise": SUITE["noise"]}))
    assert check_result.status == "fail"
    assert "one FGSM step fools" in check_result.sentence
    assert "more of the images than pgd did" in check_result.sentence


def test_attacks_that_a_plain_pgd_outdoes_fail(plain: nn.Module) -> None:
    context = context_of(Wrapped(plain, before=masked_on_data), {"fgsm": FGSM})
    check_result = convergence(context)
    assert check_result.status == "fail"
    assert "a plain PGD of 40 steps fools" in check_result.sentence
    assert "than fgsm did: the attacks of the evaluation are too weak" in check_result.sentence


def test_attacks_are_not_reported_for_images_beyond_their_limit(plain: nn.Module) -> None:
    context = context_of(Wrapped(plain, before=masked_on_data), {"fgsm": FGSM})
    outcome = replace(context.result.outcomes["fgsm"], limit=2)
    check_result = convergence(replace(context, result=replace(context.result, outcomes={"fgsm": outcome})))
    assert check_result.status == "pass"


def test_pgd_that_has_not_converged_is_a_warning_and_no_more(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(
        context: CheckContext, probe: probe_attacks.ProbeSet, attack: AttackSettings, ball: Ball, purpose: str | None
    ) -> Tensor:
        del context, ball, purpose
        return torch.arange(len(probe.rows)) < (20 if attack == pgd(20) else 3 if attack == pgd(40) else 25)

    context = context_of(plain)
    monkeypatch.setattr(probe_attacks, "survivors", slow)
    everything = {name: replace(o, correct=o.correct & False) for name, o in context.result.outcomes.items()}
    check_result = convergence(replace(context, result=replace(context.result, outcomes=everything)))
    assert check_result.status == "warn"
    assert "fools 56.7 % more of the images: PGD has not converged after 20 steps" in check_result.sentence


def test_without_white_box_attacks_only_the_probes_are_compared(plain: nn.Module) -> None:
    check_result = convergence(context_of(plain, {"noise": SUITE["noise"]}))
    assert check_result.status == "pass"
    assert "white_box" not in check_result.evidence


# 3 blackbox


def correct_except(count: int, *fallen: int) -> list[bool]:
    return [row not in fallen for row in range(count)]


@pytest.mark.parametrize(
    ("images", "added", "status"),
    [(100, 2, "pass"), (100, 3, "warn"), (100, 10, "warn"), (100, 11, "fail"), (1000, 5, "pass"), (1000, 6, "warn")],
)
def test_what_gradient_free_attacks_may_add(images: int, added: int, status: str) -> None:
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": SUITE["square"]}
    right = {"pgd": correct_except(images, 50, 51), "square": correct_except(images, *range(added), 50, 51)}
    check_result = blackbox(given_outcomes(right, attacks))
    assert check_result.status == status
    assert check_result.evidence["added"] == added
    assert ("masked gradients" in check_result.sentence) == (status != "pass")


def test_transfer_decisions_and_noise_count_as_gradient_free_and_a_custom_attack_as_neither() -> None:
    attacks: dict[str, AttackSettings] = {
        "pgd": pgd(),
        "rays": RayS(kind="rays", queries=1),
        "noise": SUITE["noise"],
        "mine": Custom(kind="own", function="x.py:f"),
    }
    right = {
        "pgd": correct_except(50),
        "rays": correct_except(50, 0, 1),
        "noise": correct_except(50, 2),
        "mine": correct_except(50, *range(20)),
    }
    check_result = blackbox(given_outcomes(right, attacks))
    assert check_result.status == "warn"
    assert check_result.evidence["by"] == {"rays": 2, "noise": 1}


def test_one_step_as_the_only_white_box_attack_is_named() -> None:
    attacks: dict[str, AttackSettings] = {"fgsm": FGSM, "square": SUITE["square"]}
    check_result = blackbox(
        given_outcomes({"fgsm": correct_except(50), "square": correct_except(50, *range(20))}, attacks)
    )
    assert check_result.status == "fail"
    assert "one step is too weak" in check_result.sentence


@pytest.mark.parametrize("names", [["pgd"], ["square", "noise"]])
def test_without_both_kinds_of_attacks_there_is_nothing_to_compare(names: list[str]) -> None:
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": SUITE["square"], "noise": SUITE["noise"]}
    context = given_outcomes({name: correct_except(50) for name in names}, {name: attacks[name] for name in names})
    assert blackbox(context).status == "not checked"


def test_an_image_that_white_box_attacks_were_not_run_on_is_no_evidence() -> None:
    attacks: dict[str, AttackSettings] = {"square": SUITE["square"], "pgd": pgd()}
    right = {"square": correct_except(50, *range(20)), "pgd": correct_except(50)}
    assert blackbox(given_outcomes(right, attacks)).status == "fail"
    check_result = blackbox(given_outcomes(right, attacks, drop_fallen=True))
    assert check_result.status == "not checked"
    assert "that not every white-box attack was run on" in check_result.sentence


def test_an_image_beyond_a_white_box_attacks_limit_is_no_evidence() -> None:
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": SUITE["square"]}
    context = given_outcomes({"pgd": correct_except(50), "square": correct_except(50, 1, *range(30, 50))}, attacks)
    outcome = context.result.outcomes["pgd"]
    met = replace(outcome, attacked=torch.arange(50) < 30, limit=30)
    check_result = blackbox(
        replace(context, result=replace(context.result, outcomes={**context.result.outcomes, "pgd": met}))
    )
    assert check_result.status == "not checked"
    assert check_result.evidence["added"] == 1


def test_later_gradient_free_attacks_add_where_the_fallen_are_dropped() -> None:
    attacks: dict[str, AttackSettings] = {"fgsm": FGSM, "pgd": pgd(), "square": SUITE["square"]}
    right = {
        "fgsm": correct_except(50, *range(10)),
        "pgd": correct_except(50, *range(20)),
        "square": correct_except(50, *range(23)),
    }
    check_result = blackbox(given_outcomes(right, attacks, drop_fallen=True))
    assert check_result.status == "warn"
    assert check_result.evidence["added"] == 3


# 7 loss increase


def write_attack(body: str) -> Custom:
    Path("mine.py").write_text(
        f"def attack(model, images, labels, *, ball, draws, is_adversarial=None):\n    {body}\n", encoding="utf-8"
    )
    return Custom(kind="own", function="mine.py:attack")


def test_an_attack_of_the_users_that_does_nothing_fails(plain: nn.Module) -> None:
    check_result = loss_increase(context_of(plain, {**SUITE, "mine": write_attack("return images.clone()")}))
    assert check_result.status == "fail"
    assert "mine has no effect" in check_result.sentence
    assert check_result.evidence["idle"] == ["mine"]


def test_an_attack_of_the_users_that_does_something_passes(plain: nn.Module) -> None:
    mine = write_attack("return ball.project(images + ball.epsilon, images)")
    assert loss_increase(context_of(plain, {**SUITE, "mine": mine})).status == "pass"


def test_an_attack_that_finds_no_boundary_in_reach_is_not_idle(plain: nn.Module) -> None:
    gives_up = "moved = 1 - images\n    return moved if ball.epsilon > 0.9 else images"
    check_result = loss_increase(context_of(plain, {**SUITE, "mine": write_attack(gives_up)}))
    assert check_result.status == "pass"
    assert check_result.evidence["idle"] == []


def test_an_idle_attack_is_no_fault_without_images(plain: nn.Module) -> None:
    attacks: dict[str, AttackSettings] = {**SUITE, "mine": write_attack("return images.clone()")}
    context = context_of(plain, attacks, LInf(0.9), drop_fallen=True)
    assert not context.result.correct["worst"].any()
    assert loss_increase(context).status == "pass"


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["fgsm", "pgd", "noise"], ["no targeted attack", "adversarial training uses"]),
        (["apgd-t", "noise"], ["no untargeted attack"]),
        (["pgd", "square"], ["no targeted attack"]),
    ],
)
def test_a_suite_of_one_kind_is_a_warning(names: list[str], missing: list[str], plain: nn.Module) -> None:
    check_result = loss_increase(only(context_of(plain), {name: SUITE[name] for name in names}))
    assert check_result.status == "warn"
    assert all(words in check_result.sentence for words in missing)
    assert check_result.sentence.count(";") == len(missing) - 1


def test_two_classes_need_no_targeted_attack(plain: nn.Module) -> None:
    context = only(context_of(plain), {"pgd": SUITE["pgd"], "square": SUITE["square"]})
    assert loss_increase(context).status == "warn"
    pair = replace(context.result, clean_logits=torch.eye(2)[context.result.labels.clamp_max(1)], outcomes={})
    assert loss_increase(replace(context, result=pair)).status == "pass"


# 8 pgd_gap


def test_a_gap_between_pgd_and_the_worst_case_is_a_warning() -> None:
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": SUITE["square"]}
    right = {"pgd": correct_except(100, *range(10)), "square": correct_except(100, *range(16))}
    check_result = pgd_gap(given_outcomes(right, attacks))
    assert check_result.status == "warn"
    assert "90.0 % under pgd and 84.0 %" in check_result.sentence


def test_a_gap_of_five_points_is_allowed() -> None:
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": SUITE["square"]}
    check_result = pgd_gap(
        given_outcomes({"pgd": correct_except(60, *range(10)), "square": correct_except(60, *range(13))}, attacks)
    )
    assert check_result.status == "pass"
    assert check_result.evidence["gap"] == 0.05


def test_a_gap_is_measured_on_the_images_within_the_limit() -> None:
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": SUITE["square"]}
    context = given_outcomes(
        {"pgd": correct_except(60), "square": correct_except(60, *range(4), *range(30, 40))}, attacks
    )
    limited = {**context.result.outcomes, "pgd": replace(context.result.outcomes["pgd"], limit=10)}
    check_result = pgd_gap(replace(context, result=replace(context.result, outcomes=limited)))
    assert check_result.evidence["gap"] == 0.4
    assert check_result.evidence["worst"] == 0.6


def test_untargeted_pgd_on_the_cross_entropy_is_preferred() -> None:
    attacks: dict[str, AttackSettings] = {"aimed": pgd(targets=3), "cw": pgd(loss="margin"), "usual": pgd()}
    assert (
        pgd_gap(given_outcomes({name: correct_except(10) for name in attacks}, attacks)).evidence["attack"] == "usual"
    )


def test_without_pgd_there_is_no_gap() -> None:
    assert pgd_gap(given_outcomes({"fgsm": correct_except(10)}, {"fgsm": FGSM})).status == "not checked"


def test_images_dropped_before_pgd_are_attacked_with_it(robust_model: nn.Module) -> None:
    """APGD drops images that a weak PGD would not have fooled; a strong PGD would have."""
    strong: dict[str, AttackSettings] = {"apgd-t": SUITE["apgd-t"], "pgd": pgd()}
    weak: dict[str, AttackSettings] = {"apgd-t": SUITE["apgd-t"], "pgd": pgd(steps=1, step_size=0.01)}
    found = {name: pgd_gap(context_of(robust_model, suite, drop_fallen=True)) for name, suite in _named(strong, weak)}
    assert found["strong"].status == "pass"
    assert found["weak"].status == "warn"
    assert found["weak"].evidence["fallen_before"] > 10


def _named(*suites: dict[str, AttackSettings]) -> list[tuple[str, dict[str, AttackSettings]]]:
    return list(zip(("strong", "weak"), suites, strict=True))


# published models


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
    on = config(LInf(0.3))
    check_result = check(CheckContext(trades, attacks, evaluate(trades, attacks, on), on, CHECK_SETTINGS, None))
    assert check_result.status == "pass", check_result.sentence


def test_its_masked_gradients_in_l2_are_found(trades: EvaluationTarget) -> None:
    """Trained for L-inf, it masks gradients in L2 (Tramer & Boneh 2019): Square fools it where PGD fails."""
    attacks: dict[str, AttackSettings] = {"pgd": pgd(), "square": Square(kind="square", queries=300, p_init=0.8)}
    on = config(L2(2.5))
    check_result = blackbox(CheckContext(trades, attacks, evaluate(trades, attacks, on), on, CHECK_SETTINGS, None))
    assert check_result.status in ("warn", "fail")
    assert "masked gradients" in check_result.sentence

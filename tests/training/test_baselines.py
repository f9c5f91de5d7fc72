"""What the mixture is compared with: hard routing, mixtures of others, their files, their settings, and their stage.

Shapes: B batch, N images, C channel, H/W pixels, D pixels of an image in one row, E experts, K classes, F features.
"""

import contextlib
import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Advmoe, edit_params
from PIL import Image
from tiny import CONSTANT, EPSILON, FACTS, JOINT, RECIPE, patterned_set
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.ball import LInf
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.registry import AttackSettings
from advmoe.config.schema import load_params
from advmoe.core import artifacts, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import load_section, validate
from advmoe.data import dataset
from advmoe.evaluation import gate_report
from advmoe.evaluation.checks.base import CheckContext, CheckSettings
from advmoe.evaluation.checks.gradients import gradients
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget, evaluate
from advmoe.models import classifiers, gate_statistics, inference, mixture
from advmoe.models.classifiers import (
    BackboneSettings,
    ConfidenceSettings,
    MixtureArchitecture,
    PlainArchitecture,
    UniformGateSettings,
)
from advmoe.models.mixture import ConfidenceHeads, ConfidentExperts, MixtureOfExperts, UniformGate, mix
from advmoe.models.prediction import predict
from advmoe.runtime.machine import generator
from advmoe.threats.victim_training import retrainable_baselines
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import Baseline, HardRouting, LastLayers, MixtureBaseline, Synergy, UniformAverage
from advmoe.training.baselines.tasks import AlternatingTask, LastLayersTask, SynergyTask, smooth_minimum
from advmoe.training.batch_attacks import PgdBatches
from advmoe.training.config import Optimizer, Validation
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.joint import AlarmThresholds, JointConfig, JointRun, train_mixture
from advmoe.training.trainer import fit
from stages import baseline, prepare, pretrain, train

BACKBONE = BackboneSettings(kind="cnn", width=3)
PGD = PgdBatches(kind="pgd", steps=(1,), step_size=1.0)
OTHERS: dict[str, MixtureBaseline] = {
    "uniform": UniformAverage.model_validate({"kind": "uniform"}),
    "more": LastLayers.model_validate({"kind": "more"}),
    "top1": HardRouting.model_validate({"kind": "top1"}),
    "soe": Synergy.model_validate({"kind": "soe", "temperature": 0.5}),
}
every_other = pytest.mark.parametrize("name", OTHERS)


def stream(*parts: object) -> torch.Generator:
    return generator("test_comparators", *parts)


DATA = patterned_set(stream)
IMAGES, LABELS = DATA["validation"].pixels(), DATA["validation"].labels


def joint_recipe(**changes: Any) -> JointConfig:
    own: dict[str, Any] = {
        "epochs": 1,
        "optimizer": Optimizer(lr=0.05, momentum=0.9, weight_decay=0.01),
        "schedule": CONSTANT,
        "clip": 1.0,
        "validation": Validation(steps=1, step_size=1.0, gap=0.9, images=18),
        "adversary": PGD,
        "alarms": AlarmThresholds(load=0.999, gradient=1e-9),
    }
    return JointConfig(**RECIPE | JOINT | own | changes)


def lived_in(seed: int) -> nn.Module:
    """An untrained expert whose BatchNorms have seen images."""
    model = classifiers.build(PlainArchitecture(kind="plain", backbone=BACKBONE), FACTS, seed)
    with torch.no_grad():
        for batch in torch.split(DATA["train"].pixels(), 16):
            model.train()(batch)
    return model.eval()


def start_of(name: str, **changes: Any) -> MixtureOfExperts:
    """The mixture that training starts from."""
    recipe = joint_recipe(**changes)
    design = specs.mixture_design(OTHERS[name], recipe)
    architecture = MixtureArchitecture(
        kind="mixture", backbone=BACKBONE, experts=recipe.experts, gate=design.gate, mixing=design.mixing
    )
    return classifiers.build_mixture(architecture, FACTS, [lived_in(1), lived_in(2)], 0, "tiny")


def trained_as(name: str, **changes: Any) -> tuple[TrainingResult, MixtureArchitecture]:
    recipe = joint_recipe(**changes)
    design = specs.mixture_design(OTHERS[name], recipe)
    experts = [lived_in(1), lived_in(2)]
    return train_mixture(JointRun(experts, BACKBONE, DATA, recipe, 0, EPSILON, name="tiny", design=design))


def mixture_of(trained: TrainingResult) -> MixtureOfExperts:
    assert isinstance(trained.model, MixtureOfExperts)
    return trained.model


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Names of the tensors, BatchNorm statistics included, that are no longer what they were."""
    tensors = after.state_dict()
    return {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, tensors[name])}


def test_shuffled_experts_of_these_tests_differ() -> None:
    """Or none of what follows would mean much."""
    left, right = (inference.predict(lived_in(seed), IMAGES, 18).log_softmax(1) for seed in (1, 2))
    assert (left - right).abs().amax(1).min() > 0.05


# ---- hard routing


class Linear(nn.Module):
    """Scores W x; as a gate log weights."""

    def __init__(self, name: str, outputs: int, normed: bool = False) -> None:
        super().__init__()
        self.weights_KD = nn.Parameter(torch.randn(outputs, 16, generator=stream("linear", name)), requires_grad=False)
        self.normed = normed

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores = images_BCHW.flatten(1) @ self.weights_KD.T
        return functional.log_softmax(scores, dim=1) if self.normed else scores


def linear_mixture(experts: int = 3) -> MixtureOfExperts:
    voters = [Linear(f"expert {number}", 4) for number in range(experts)]
    return MixtureOfExperts(voters, Linear("gate", experts, normed=True), "top1")


def linear_images(count: int = 30) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=stream("linear images"))


def test_the_answer_is_the_chosen_experts_to_the_last_bit() -> None:
    model, images = linear_mixture(), linear_images()
    chosen = model.gate(images).argmax(1)
    assert set(chosen.tolist()) == {0, 1, 2}
    answers_EBK = torch.stack([expert(images).log_softmax(1) for expert in model.experts])
    assert torch.equal(model(images), answers_EBK[chosen, torch.arange(len(images))])


def test_an_expert_that_is_not_chosen_may_be_as_wrong_as_it_likes() -> None:
    log_gate_BE = torch.tensor([[0.6, 0.4]]).log()
    calm, wild = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 2.0], [1e30, -1e30]]])
    assert torch.equal(mix(log_gate_BE, calm, "top1"), mix(log_gate_BE, wild, "top1"))


def test_gradient_goes_straight_through_the_choice() -> None:
    """Backwards sum_e dg_e log p_e beside the chosen expert's own slope, all worked out by hand."""
    model, images = linear_mixture(), linear_images()
    rows, labels = torch.arange(len(images)), torch.arange(len(images)) % 4
    pixels = images.clone().requires_grad_()
    functional.nll_loss(model(pixels), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    gate_ED = model.gate.weights_KD
    assert isinstance(gate_ED, Tensor)
    g_BE = (images.flatten(1) @ gate_ED.T).softmax(1)
    dg_BED = g_BE[:, :, None] * (gate_ED[None] - (g_BE @ gate_ED)[:, None])
    of_gate, of_expert = torch.zeros(len(images), 16), torch.zeros(len(images), 16)
    for number, expert in enumerate(model.experts):
        weights_KD = expert.weights_KD
        assert isinstance(weights_KD, Tensor)
        p_BK = (images.flatten(1) @ weights_KD.T).softmax(1)
        of_gate += dg_BED[:, number] * p_BK[rows, labels].log()[:, None]
        is_chosen = (g_BE.argmax(1) == number).float()[:, None]
        of_expert += is_chosen * (weights_KD[labels] - p_BK @ weights_KD)
    assert pixels.grad is not None
    torch.testing.assert_close(pixels.grad.flatten(1), -(of_gate + of_expert), atol=1e-5, rtol=1e-4)
    assert of_gate.abs().amax(1).min() > 1e-3  # a gradient without it would be seen
    assert of_expert.abs().amax(1).min() > 1e-3


def test_the_gate_learns_from_all_experts_and_only_the_chosen_one_learns() -> None:
    log_gate_BE = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    logits_BEK = torch.randn(1, 3, 4, generator=stream("votes")).requires_grad_()
    mix(log_gate_BE, logits_BEK, "top1")[0, 2].backward()  # type: ignore[no-untyped-call]
    assert log_gate_BE.grad is not None
    assert logits_BEK.grad is not None
    answers = logits_BEK.detach().log_softmax(2)[:, :, 2]
    torch.testing.assert_close(log_gate_BE.grad, torch.tensor([[0.5, 0.3, 0.2]]) * answers)
    assert (logits_BEK.grad[0, 0] != 0).all()
    assert (logits_BEK.grad[0, 1:] == 0).all()


@pytest.mark.parametrize(("weights", "chosen"), [((1, 1, 1), 0), ((1, 2, 2), 1), ((2, 1, 2), 0)])
def test_of_equal_weights_the_first_is_taken_and_only_one(weights: tuple[int, ...], chosen: int) -> None:
    log_gate_BE = (torch.tensor([weights]) / sum(weights)).log()
    logits_BEK = torch.randn(1, 3, 4, generator=stream("ties"))
    assert torch.equal(mix(log_gate_BE, logits_BEK, "top1"), logits_BEK[:, chosen].log_softmax(1))


GATED: dict[str, AttackSettings] = {
    "pgd": Pgd(kind="pgd", steps=5, step_size=0.25, restarts=1, loss="ce", targets=0),
    "gate-frozen": GateFrozen(kind="gate-frozen", steps=5, step_size=0.25, restarts=1),
    "misrouting": Misrouting(kind="misrouting", steps=5, step_size=0.25, restarts=1, lambdas=(0.0, 10.0)),
    "experts": Experts(kind="experts", steps=5, step_size=0.25, restarts=1),
}


def only_the_choice_matters() -> MixtureOfExperts:
    """Two experts that do not look: one always right about class 0, one always wrong. The gate looks."""

    class Stubborn(nn.Module):
        def __init__(self, answer: list[float]) -> None:
            super().__init__()
            self.answer = torch.tensor(answer)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            return self.answer + 0 * images_BCHW.flatten(1).sum(1, keepdim=True)

    return MixtureOfExperts([Stubborn([4.0, 0.0]), Stubborn([0.0, 4.0])], Linear("gate", 2, normed=True), "top1")


def outcomes(
    model: MixtureOfExperts, attacks: dict[str, AttackSettings], epsilon: float
) -> tuple[EvaluationTarget, Any]:
    images = linear_images()
    labels = inference.predict(model, images, 30).argmax(1)
    target = EvaluationTarget("hard", model, images, labels)
    terms = EvaluationConfig(LInf(epsilon), seed=0, precision="float32", batch_size=None, drop_fallen=False)
    return target, evaluate(target, attacks, terms)


@pytest.mark.usefixtures("own_folder")
def test_attacks_see_the_routing_through_the_choice() -> None:
    """Only another choice changes an answer here: what goes through the gate finds it, a frozen gate does not move."""
    model = only_the_choice_matters()
    _, measured = outcomes(model, GATED, 0.25)
    robust = {name: float(right.float().mean()) for name, right in measured.correct.items()}
    assert robust["clean"] == 1
    assert robust["pgd"] < 0.5
    assert robust["misrouting"] <= robust["pgd"]
    assert robust["gate-frozen"] > 0.9  # its random start alone
    assert robust["experts"] > 0.9


@pytest.mark.usefixtures("own_folder")
def test_gate_aware_attacks_fool_a_mixture_that_routes_hard() -> None:
    target, measured = outcomes(linear_mixture(), GATED, 0.1)
    for name, outcome in measured.outcomes.items():
        assert float(outcome.correct.float().mean()) < 0.5, name
        assert (outcome.images - target.images).abs().max() <= 0.1 + 1e-6


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness keeps for resuming goes here."""
    monkeypatch.chdir(tmp_path)


def gradient_check(model: MixtureOfExperts) -> tuple[str, str]:
    attacks = {"pgd": GATED["pgd"]}
    target, measured = outcomes(model, attacks, 0.05)
    terms = EvaluationConfig(LInf(0.05), seed=0, precision="float32", batch_size=None, drop_fallen=False)
    found = gradients(
        CheckContext(target, attacks, measured, terms, CheckSettings(images=12, steps=3, samples=10), None)
    )
    return found.status, found.sentence


@pytest.mark.usefixtures("own_folder")
def test_the_check_of_gradients_does_not_blame_an_open_choice_and_does_a_blocked_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gradient_check(linear_mixture())[0] == "pass"

    def blocked(log_gate_BE: Tensor, mixing: mixture.Mixing) -> Tensor:
        assert mixing == "top1"
        return functional.one_hot(log_gate_BE.argmax(dim=1), log_gate_BE.shape[1]).float()

    monkeypatch.setattr(mixture, "expert_weights", blocked)
    status, sentence = gradient_check(linear_mixture())
    assert status == "fail"
    assert sentence.startswith("the gate is not differentiable: gate changes with the pixels")


@pytest.mark.usefixtures("own_folder")
@every_other
def test_the_check_of_gradients_blames_no_comparator(name: str) -> None:
    model = mixture_of(trained_as(name)[0])
    attacks = {"pgd": GATED["pgd"]}
    target = EvaluationTarget(name, model, IMAGES, inference.predict(model, IMAGES, 18).argmax(1))
    terms = EvaluationConfig(LInf(0.05), seed=0, precision="float32", batch_size=None, drop_fallen=False)
    case = CheckContext(
        target, attacks, evaluate(target, attacks, terms), terms, CheckSettings(images=12, steps=3, samples=10), None
    )
    assert gradients(case).status == "pass"


# ---- what each of them is made of


def test_uniform_has_no_gate_and_the_mixtures_own_mixing() -> None:
    for mixing in ("probabilities", "logits"):
        design = specs.mixture_design(OTHERS["uniform"], joint_recipe(mixing=mixing))
        assert (design.gate, design.mixing) == (UniformGateSettings(kind="uniform"), mixing)
    model = start_of("uniform")
    assert isinstance(model.gate, UniformGate)
    assert list(model.gate.parameters()) == []
    average = torch.stack([inference.predict(expert, IMAGES, 18).softmax(1) for expert in model.experts]).mean(0)
    torch.testing.assert_close(inference.predict(model, IMAGES, 18).exp(), average)


def test_designs_of_the_others() -> None:
    recipe = joint_recipe()
    designs = {name: specs.mixture_design(other, recipe) for name, other in OTHERS.items()}
    assert (designs["more"].gate, designs["more"].mixing) == (recipe.gate, "probabilities")
    assert (designs["top1"].gate, designs["top1"].mixing) == (recipe.gate, "top1")
    assert (designs["soe"].gate, designs["soe"].mixing) == (
        ConfidenceSettings(kind="confidence", temperature=0.5),
        "top1",
    )
    learners = [designs[name].make_task for name in ("more", "top1", "soe")]
    assert learners == [LastLayersTask, AlternatingTask, SynergyTask]


def test_the_mixture_itself_never_routes_hard() -> None:
    """`train.mixing: top1` would train a gate that nobody asked for by the recipe of another."""
    with pytest.raises(UserError, match=r"^params.yaml: train.mixing: input should be 'probabilities' or 'logits'"):
        validate(joint_recipe().model_dump() | {"mixing": "top1"}, JointConfig, "params.yaml", "train")


@every_other
def test_training_starts_from_copies_of_the_experts(name: str) -> None:
    model = start_of(name)
    for expert, seed in zip(model.experts, (1, 2), strict=True):
        assert changed(lived_in(seed), expert) == set()
    trained, _ = trained_as(name)
    assert changed(model, mixture_of(trained)) != set()
    assert not any(module.training for module in trained.model.modules())


@every_other
def test_twice_the_same_and_from_another_seed_another(name: str) -> None:
    (first, architecture), (second, _) = trained_as(name), trained_as(name)
    assert changed(first.model, second.model) == set()
    assert (first.history, first.cost) == (second.history, second.cost)
    assert architecture.experts == ("left", "right")


@pytest.mark.parametrize(("name", "epochs"), [("uniform", 6), ("more", 30), ("top1", 6), ("soe", 6)])
def test_training_lowers_the_loss(name: str, epochs: int) -> None:
    """Last layers alone need longer, on experts that never learned anything."""
    history = trained_as(name, epochs=epochs)[0].history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


@every_other
def test_weights_of_the_experts_add_up(name: str) -> None:
    weights_NE = gate_statistics.gate_weights(mixture_of(trained_as(name, epochs=2)[0]), IMAGES)
    assert weights_NE.shape == (18, 2)
    torch.testing.assert_close(weights_NE.sum(1), torch.ones(18))
    moved = float((weights_NE - 0.5).abs().max())
    assert moved == 0 if name == "uniform" else moved > 1e-3


@every_other
def test_weights_are_those_of_the_forward_pass(name: str) -> None:
    model = mixture_of(trained_as(name, epochs=2)[0])
    with torch.no_grad():
        parts = model.forward_parts(IMAGES)
    counts_NE = parts.log_gate_BE.exp()
    if model.mixing == "top1":  # one expert answers, the others count for nothing
        counts_NE = functional.one_hot(counts_NE.argmax(1), 2).float()
    torch.testing.assert_close(gate_statistics.gate_weights(model, IMAGES), counts_NE, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.log_gate(IMAGES), parts.log_gate_BE, atol=1e-6, rtol=1e-5)
    assert torch.equal(model(IMAGES), parts.log_probs_BK)


def test_uniform_is_watched_without_a_gate_to_look_at() -> None:
    trained, _ = trained_as("uniform", alarms=AlarmThresholds(load=0.6, gradient=1e3))
    assert trained.alarms == []
    assert "gate_gradient" not in trained.history[0]
    found = {key: trained.kept[key] for key in ("gate_entropy", "gate_shift", "load_left", "load_right")}
    expected = {"gate_entropy": math.log(2), "gate_shift": 0.0, "load_left": 0.5, "load_right": 0.5}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["more", "top1", "soe"])
def test_a_gate_that_learns_is_watched(name: str) -> None:
    row = trained_as(name)[0].history[0]
    assert row["gate_gradient"] > 0
    assert row["load_left"] + row["load_right"] == pytest.approx(1.0, abs=1e-5)
    load = max(row["load_left"], row["load_right"])
    alarms = trained_as(name, alarms=AlarmThresholds(load=0.999, gradient=1e3))[0].alarms
    assert alarms[-1] == "gate: no gradient in epoch 1, it does not learn"
    assert [alarm for alarm in alarms[:-1] if "collapsed" in alarm] == alarms[:-1]
    assert len(alarms) == 1 + (load > 0.999)


def test_a_hard_choice_that_is_always_the_same_is_a_collapse_however_soft_the_weights() -> None:
    trained, _ = trained_as("top1", alarms=AlarmThresholds(load=0.999, gradient=1e-12))
    row = trained.kept
    assert {row["load_left"], row["load_right"]} == {0.0, 1.0}  # all of these few images go one way
    with torch.no_grad():
        soft_N = mixture_of(trained).log_gate(IMAGES).exp().amax(1)
    assert soft_N.max() < 0.999
    assert trained.alarms == [
        f"gate: collapsed, expert {'left' if row['load_left'] else 'right'} has 100% of the weight"
    ]


# ---- MoRE: frozen experts


def test_more_changes_the_gate_and_the_last_layers_and_nothing_else() -> None:
    before, trained = start_of("more"), trained_as("more", epochs=2)[0]
    moved = changed(before, trained.model)
    last = {f"experts.{number}.classify.{part}" for number in (0, 1) for part in ("weight", "bias")}
    of_gate = {f"gate.{name}" for name in before.gate.state_dict() if not name.startswith("normalize")}
    assert moved == last | of_gate


def test_more_learns_in_the_state_that_pre_training_left() -> None:
    """Expert statistics are those of pre-training in the forward pass too, not the batch's."""
    task = LastLayersTask(start_of("more").train(), joint_recipe())
    task.on_step_start()
    assert task.mixture.gate.training
    assert not any(module.training for module in task.mixture.experts.modules())
    whole = task.mixture.forward_parts(IMAGES).logits_BEK
    alone = task.mixture.forward_parts(IMAGES[:2]).logits_BEK
    torch.testing.assert_close(whole[:2], alone, atol=1e-5, rtol=1e-4)


def test_more_gives_each_part_its_own_rate() -> None:
    task = LastLayersTask(start_of("more"), joint_recipe(gate_lr=0.7))
    optimizer = task.optimizer()
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    heads = [
        parameter for expert in task.mixture.experts for parameter in expert.get_submodule("classify").parameters()
    ]
    assert {rates.pop(id(parameter)) for parameter in heads} == {0.05}
    assert {rates.pop(id(parameter)) for parameter in task.mixture.gate.parameters()} == {0.7}
    assert rates == {}


# ---- AdvMoE: turn by turn


class Turns(AlternatingTask):
    """Keeps all numbers as each step finds them."""

    def __init__(self, model: MixtureOfExperts, recipe: JointConfig) -> None:
        super().__init__(model, recipe)
        self.seen: list[nn.Module] = []

    def on_step_start(self) -> None:
        self.seen.append(copy.deepcopy(self.mixture))
        super().on_step_start()


def turns(epochs: int = 2, **changes: Any) -> list[set[str]]:
    """Which part changed in each step of a run, one after another."""
    recipe = joint_recipe(epochs=epochs, **changes)
    task = Turns(start_of("top1"), recipe)
    trained = fit(task, TrainingJob("tiny", 0, DATA, recipe, recipe.adversary, EPSILON, "pgd"))
    seen = [*task.seen, trained.model]
    assert len(seen) == epochs * 6 + 1
    return [changed(before, after) for before, after in itertools.pairwise(seen)]


def part_of(names: set[str], part: str) -> set[str]:
    return {name for name in names if name.startswith(f"{part}.")}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gate_and_experts_take_turns_and_hold_still_meanwhile(momentum: float) -> None:
    """BatchNorm statistics too, and momentum and weight decay push nobody whose turn it is not."""
    found = turns(optimizer=Optimizer(lr=0.05, momentum=momentum, weight_decay=0.01))
    for step, moved in enumerate(found):
        part = "experts" if step % 2 else "gate"
        assert moved == part_of(moved, part), f"step {step}"
        assert any("running_mean" in name for name in moved), f"step {step}"
        assert any("weight" in name for name in moved), f"step {step}"


def test_only_the_experts_that_were_chosen_learn() -> None:
    model = start_of("top1")
    with torch.no_grad():
        model.gate.get_parameter("score.bias").copy_(torch.tensor([0.0, 3.0]))
    task = AlternatingTask(model, joint_recipe())
    for _ in range(2):
        task.on_step_start()
    task.loss(IMAGES, LABELS, IMAGES).backward()  # type: ignore[no-untyped-call]
    first, second = ([parameter.grad for parameter in expert.parameters()] for expert in model.experts)
    assert all(gradient is not None and (gradient == 0).all() for gradient in first)
    assert any(gradient is not None and (gradient != 0).any() for gradient in second)
    assert all(parameter.grad is None for parameter in model.gate.parameters())


def test_the_gate_has_the_first_turn() -> None:
    model = start_of("top1")
    task = AlternatingTask(model, joint_recipe())
    task.on_step_start()
    task.loss(IMAGES, LABELS, IMAGES).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.experts.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.gate.parameters())


# ---- Synergy-of-Experts


def test_smooth_minimum_is_minus_the_logarithm_of_the_mean_probability() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.5]])
    found = smooth_minimum(-probabilities.log())
    torch.testing.assert_close(found, -torch.tensor([0.4, 0.5]).log())


def test_smooth_minimum_lies_between_least_and_mean_and_survives_large_losses() -> None:
    losses_BE = 5 * torch.rand(50, 4, generator=stream("losses"))
    found = smooth_minimum(losses_BE)
    assert (found > losses_BE.amin(1)).all()
    assert (found < losses_BE.mean(1)).all()
    assert (found < losses_BE.amin(1) + math.log(4)).all()
    assert float(smooth_minimum(torch.tensor([[1000.0, 2000.0]]))) == pytest.approx(1000 + math.log(2))


def test_gradient_of_the_smooth_minimum_goes_to_the_best() -> None:
    losses_BE = torch.tensor([[0.1, 2.0, 4.0]], requires_grad=True)
    smooth_minimum(losses_BE).backward()  # type: ignore[no-untyped-call]
    assert losses_BE.grad is not None
    torch.testing.assert_close(losses_BE.grad, (-losses_BE.detach()).softmax(1))
    assert losses_BE.grad[0, 0] > 0.8


def synergy(**changes: Any) -> SynergyTask:
    model = start_of("soe", **changes)
    assert isinstance(model, ConfidentExperts)
    return SynergyTask(model, joint_recipe(**changes))


def heads_of(model: MixtureOfExperts) -> list[nn.Linear]:
    assert isinstance(model.gate, ConfidenceHeads)
    return [head for head in model.gate.heads if isinstance(head, nn.Linear)]


def right_of(model: MixtureOfExperts) -> Tensor:
    """The probability that each expert gives to the true class."""
    with torch.no_grad():
        return torch.stack([expert(IMAGES).softmax(1)[torch.arange(18), LABELS] for expert in model.experts], dim=1)


def test_loss_of_synergy_is_worked_out_by_hand() -> None:
    task = synergy()
    model = task.mixture.eval()
    with torch.no_grad():
        for head, bias in zip(heads_of(model), (0.7, -0.4), strict=True):
            head.bias.fill_(bias)
        found = float(task.loss(IMAGES, LABELS, IMAGES))
    p_NE, sure_E = right_of(model), torch.tensor([0.7, -0.4]).sigmoid()
    unsure = -(p_NE * sure_E.log() + (1 - p_NE) * (1 - sure_E).log()).mean()
    assert found == pytest.approx(float(-p_NE.mean(1).log().mean() + unsure), abs=1e-5)


def test_confidence_learns_the_probability_of_the_true_class() -> None:
    """At the logit of the mean of p(true) the slope is nil, beside it it points there."""
    task = synergy()
    model = task.mixture.eval()
    p_E = right_of(model).mean(0)
    for offset, direction in ((0.0, 0.0), (1.0, 1.0), (-1.0, -1.0)):
        model.zero_grad()
        with torch.no_grad():
            for head, p in zip(heads_of(model), p_E, strict=True):
                head.bias.fill_(float(torch.logit(p)) + offset)
        task.loss(IMAGES, LABELS, IMAGES).backward()  # type: ignore[no-untyped-call]
        slopes = torch.cat([head.bias.grad for head in heads_of(model) if head.bias.grad is not None])
        expected = (torch.logit(p_E) + offset).sigmoid() - p_E
        torch.testing.assert_close(slopes, expected / 2, atol=1e-5, rtol=1e-4)  # a mean over two experts
        assert torch.equal(slopes.abs() < 1e-5, torch.full((2,), direction == 0))
        assert direction == 0 or (slopes.sign() == direction).all()


def test_experts_do_not_learn_to_fit_what_is_said_of_them() -> None:
    """The target of a confidence is taken as it is: votes learn from the smooth minimum alone."""
    task = synergy()
    model = task.mixture.eval()
    with torch.no_grad():
        for head, bias in zip(heads_of(model), (2.0, -2.0), strict=True):
            head.bias.fill_(bias)
    task.loss(IMAGES, LABELS, IMAGES).backward()  # type: ignore[no-untyped-call]
    found = [expert.get_parameter("classify.bias").grad for expert in model.experts]
    with torch.no_grad():
        answers_NEK = torch.stack([expert(IMAGES).softmax(1) for expert in model.experts], dim=1)
        share_NE = right_of(model) / right_of(model).sum(1, keepdim=True)
        errors = answers_NEK - functional.one_hot(LABELS, 3)[:, None]
        expected_EK = (share_NE[:, :, None] * errors).mean(0)
    for gradient, expected_K in zip(found, expected_EK, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, expected_K, atol=1e-5, rtol=1e-4)


def test_untrained_confidences_are_equal_and_the_first_expert_answers() -> None:
    model = start_of("soe")
    assert torch.equal(gate_statistics.gate_weights(model, IMAGES), torch.tensor([[1.0, 0.0]]).expand(18, 2))
    with torch.no_grad():
        torch.testing.assert_close(model.log_gate(IMAGES).exp(), torch.full((18, 2), 0.5))
        torch.testing.assert_close(model(IMAGES), model.experts[0](IMAGES).log_softmax(1))


def test_the_surest_expert_answers() -> None:
    model = mixture_of(trained_as("soe", epochs=4)[0])
    assert isinstance(model, ConfidentExperts)
    with torch.no_grad():
        features_NEF = model.features(IMAGES)
        by_hand_NE = torch.cat([head(features_NEF[:, e]) for e, head in enumerate(heads_of(model))], dim=1)
        torch.testing.assert_close(model.gate.confidence(features_NEF), by_hand_NE)
        answers_NEK = torch.stack([expert(IMAGES).log_softmax(1) for expert in model.experts], dim=1)
        torch.testing.assert_close(model(IMAGES), answers_NEK[torch.arange(18), by_hand_NE.argmax(1)])
        torch.testing.assert_close(model.log_gate(IMAGES), (by_hand_NE / 0.5).log_softmax(1))


# ---- files


@every_other
def test_a_saved_comparator_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    trained, architecture = trained_as(name)
    path = tmp_path / f"{name}.safetensors"
    classifiers.save(path, trained.model, architecture, FACTS, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    loaded = classifiers.load(path)
    assert loaded.about.architecture == architecture
    assert type(loaded.model) is type(trained.model)
    tensors = loaded.model.state_dict()
    kept = {key for key in tensors if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(tensors[key], trained.model.state_dict()[key]) for key in kept)
    assert torch.equal(inference.predict(loaded.model, IMAGES, 18), inference.predict(trained.model, IMAGES, 18))
    again = tmp_path / "again.safetensors"
    classifiers.save(again, loaded.model, architecture, FACTS, params={}, inputs={}, seed=0, metrics={}, seconds=9.0)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("name", "other"), [("uniform", "top1"), ("soe", "more"), ("more", "uniform")])
def test_tensors_of_another_design_are_refused(name: str, other: str, tmp_path: Path) -> None:
    (trained, _), (_, architecture) = trained_as(name), trained_as(other)
    path = tmp_path / "mixed-up.safetensors"
    classifiers.save(path, trained.model, architecture, FACTS, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    with pytest.raises(UserError, match="does not match the architecture in the header"):
        classifiers.load(path)


@pytest.mark.usefixtures("own_folder")
@every_other
def test_what_the_gate_does_under_attack_is_measured(name: str) -> None:
    model = mixture_of(trained_as(name, epochs=3)[0])
    target = EvaluationTarget(name, model, IMAGES, LABELS)
    terms = EvaluationConfig(LInf(0.05), seed=0, precision="float32", batch_size=None, drop_fallen=False)
    measured = evaluate(target, GATED, terms)
    report = gate_report.gate_weights_by_attack(target, measured, ("left", "right"))
    assert list(report) == ["clean", *GATED]
    for row in report.values():
        assert sum(row["mean_weight"].values()) == pytest.approx(1.0, abs=1e-5)
        assert 0 <= row["entropy"] <= math.log(2) + 1e-6
    shifts = [row["shift"] for row in report.values()]
    assert shifts[0] == 0
    if name == "more":
        assert max(shifts) > 0
    elif name == "uniform":
        assert max(shifts) == 0
    else:  # a hard choice changes for whole images
        assert all((len(IMAGES) * shift) == pytest.approx(round(len(IMAGES) * shift), abs=1e-4) for shift in shifts)
    oracle = gate_report.oracle_accuracy(target, measured)
    for attack, right in measured.correct.items():
        if attack != "worst" and model.mixing == "top1":  # whoever was chosen, a better choice is at least as good
            assert oracle[attack]["accuracy"] >= float(right.float().mean()) - 1e-6


# ---- settings

SINGLE: dict[str, Any] = {
    "kind": "single",
    "backbone": "cnn",
    "match": "nothing",
    "seed": 0,
    "adversary": {"kind": "pgd", "steps": [1], "step_size": 1.0},
}
EQUAL_PASSES = {name: value for name, value in SINGLE.items() if name != "match"} | {"kind": "equal-passes"}
UNIFORM: dict[str, Any] = {"kind": "uniform"}
SOE: dict[str, Any] = {"kind": "soe", "temperature": 1.0}
DISTILLED: dict[str, Any] = {name: value for name, value in SINGLE.items() if name != "match"} | {
    "kind": "distilled",
    "alpha": 0.75,
}
TRADES: dict[str, Any] = {"kind": "trades", "steps": [1], "step_size": 1.0, "beta": 6.0}
DERIVED = ": what a stage depends on is derived from params.yaml now"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (SINGLE | {"beside": "train"}, f"delete 'beside'{DERIVED}"),
        (SINGLE | {"reads": "seed", "needs": "prepare"}, f"delete 'reads', 'needs'{DERIVED}"),
        (EQUAL_PASSES | {"needs": "pretrain"}, f"delete 'needs'{DERIVED}"),
        (UNIFORM | {"reads": "epsilon"}, f"delete 'reads'{DERIVED}"),
        (SOE | {"beside": "train"}, f"delete 'beside'{DERIVED}"),
        (DISTILLED | {"needs": "train/mixture.safetensors"}, f"delete 'needs'{DERIVED}"),
        (SINGLE | {"match": "passes"}, "'match: passes' is 'kind: equal-passes' now; replace one by the other"),
        (
            DISTILLED | {"adversary": TRADES},
            "a 'trades' adversary has no attacked images of its own; fgsm, n-fgsm, pgd, pgd-radii and mixed have",
        ),
        (
            DISTILLED | {"adversary": {"kind": "clean"}},
            "a 'clean' adversary has no attacked images of its own; fgsm, n-fgsm, pgd, pgd-radii and mixed have",
        ),
    ],
)
def test_keys_of_earlier_versions_and_adversaries_without_images_are_refused(
    inputs_only: Path, edit: Callable[[dict[str, Any]], None], entry: dict[str, Any], expected: str
) -> None:
    del inputs_only
    edit({"baseline.mine": entry})
    for read in (load_params, lambda: specs.load("baseline.mine")):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == f"params.yaml: baseline.mine: {expected}"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"kind": "boosting"}, "baseline.mine: input tag 'boosting'"),
        ({name: SINGLE[name] for name in SINGLE if name != "kind"}, "baseline.mine: unable to extract tag"),
        (SINGLE | {"backbone": "vgg"}, "baseline.mine.backbone: input should be 'resnet18', 'resnet50'"),
        (SINGLE | {"match": "seconds"}, "baseline.mine.match: input should be 'nothing', 'parameters' or 'passes'"),
        (UNIFORM | {"seed": 0}, "baseline.mine.seed: is not a known key"),
        (UNIFORM | {"temperature": 1.0}, "baseline.mine.temperature: is not a known key"),
        (SOE | {"temperature": 0}, "baseline.mine.temperature: input should be greater than 0"),
        ({"kind": "soe"}, "baseline.mine.temperature: is missing"),
        (DISTILLED | {"alpha": 1.5}, "baseline.mine.alpha: input should be less than or equal to 1"),
        (
            SINGLE | {"adversary": {"kind": "mixed", "weights": [1], "of": [TRADES]}},
            "baseline.mine.adversary.of.0: input tag 'trades'",
        ),
    ],
)
def test_an_entry_that_cannot_be_has_a_sentence_of_its_own(
    inputs_only: Path, edit: Callable[[dict[str, Any]], None], entry: dict[str, Any], expected: str
) -> None:
    del inputs_only
    edit({"baseline.mine": entry})
    for read in (load_params, lambda: specs.load("baseline.mine")):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(f"params.yaml: {expected}")
        assert len(str(caught.value).splitlines()) == 1


def test_a_distilled_network_has_a_name_that_tells_when_it_is_trained(
    inputs_only: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    del inputs_only
    edit({"baseline.distilled-small": DISTILLED})
    load_params()
    edit({"baseline.small": DISTILLED})
    with pytest.raises(
        UserError, match=r"^params.yaml: baseline.small: the name of a distilled network must begin with "
    ):
        load_params()


@pytest.mark.parametrize("section", ["train", "experts.pgd-1"])
def test_trades_is_for_experts_and_mixtures_too(
    inputs_only: Path, edit: Callable[[dict[str, Any]], None], section: str
) -> None:
    del inputs_only
    edit({f"{section}.adversary": TRADES})
    params = load_params()
    assert (params.train if section == "train" else params.experts["pgd-1"]).adversary.kind == "trades"


def test_only_plain_networks_that_match_nothing_can_be_trained_anew() -> None:
    entries = {
        "plain": SINGLE,
        "trades": SINGLE | {"adversary": TRADES},
        "wide": SINGLE | {"match": "parameters"},
        "long": EQUAL_PASSES,
        "uniform": UNIFORM,
        "soe": SOE,
        "distilled": DISTILLED,
    }
    read: dict[str, Baseline] = validate(entries, dict[str, Baseline], "params.yaml")
    assert list(retrainable_baselines(read)) == ["plain", "trades"]


@pytest.mark.parametrize("name", ["uniform", "equal-parameters"])
def test_no_shadows_of_what_cannot_be_trained_anew(
    inputs_only: Path, edit: Callable[[dict[str, Any]], None], name: str
) -> None:
    del inputs_only
    edit({"membership.victims": {name: 0}, "membership.against": name})
    with pytest.raises(UserError) as caught:
        load_params()
    assert str(caught.value).startswith(f"params.yaml: membership.victims lists '{name}', but victims are mixture, ")


# ---- the stage

EXPERTS = ["clean", "pgd-1"]
ATTACK = {"kind": "pgd", "steps": [1], "step_size": 0.5}
LOOK = {"steps": 1, "step_size": 0.5, "gap": 0.9, "images": 20}
ENTRIES: dict[str, dict[str, Any]] = {
    "standard": SINGLE | {"adversary": {"kind": "clean"}},
    "adversarial": SINGLE,
    "trades": SINGLE | {"adversary": TRADES},
    "equal-parameters": SINGLE | {"match": "parameters"},
    "equal-passes": EQUAL_PASSES,
    "resnet50": SINGLE | {"backbone": "resnet50"},
    "uniform": UNIFORM,
    "more": UNIFORM | {"kind": "more"},
    "top1": UNIFORM | {"kind": "top1"},
    "soe": SOE,
    "distilled": DISTILLED,
}
OF_EXPERTS = ("uniform", "more", "top1", "soe")
PIPELINE: dict[str, Any] = {
    "model": {"kind": "cnn", "width": 2},
    "prepare.splits": {"pool": 1517, "validation": 60, "test": 120},  # 100 to train on
    "pretrain.epochs": 2,
    "pretrain.batch_size": 50,
    "train.batch_size": 50,
    "pretrain.validation": LOOK,
    "train.validation": LOOK,
    "train.experts": EXPERTS,
    "train.adversary": ATTACK,
    "experts": {
        "clean": {"seed": 0, "adversary": {"kind": "clean"}},
        "pgd-1": {"seed": 5, "adversary": ATTACK},
    },
    "baseline": ENTRIES,
    "evaluate.baselines": list(ENTRIES),
    "report.claims": {"more-robust": {"model": "mixture", "over": "baseline/uniform", "under": "worst"}},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, built_project: Path) -> Path:
    """A pipeline of tiny networks up to one comparator of each kind, trained by the stages."""
    folder = tmp_path_factory.mktemp("comparators") / "built"
    shutil.copytree(built_project, folder)
    with contextlib.chdir(folder):
        torch.set_num_threads(1)
        edit_params(PIPELINE)
        prepare.run()
        for name in EXPERTS:
            pretrain.run(name)
        train.run()
        for name in ENTRIES:
            baseline.run(name)
    return folder


@pytest.fixture
def pipeline(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that pipeline; the test runs inside it."""
    folder = tmp_path / "pipeline"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    return folder


every_entry = pytest.mark.parametrize("name", ENTRIES)


@every_entry
def test_the_stage_writes_artifact_metrics_and_history(pipeline: Path, name: str) -> None:
    del pipeline
    found = classifiers.load(paths.artifact("baseline", name))
    metrics = files.read_json(paths.metrics("baseline", name))
    assert metrics == found.header.metrics
    loads = [load for key, load in metrics["validation"].items() if key.startswith("load_")]
    collapsed = max(loads, default=0.0) > 0.9  # the gate of a hard choice may well be, after an epoch
    assert len(metrics["alarms"]) == collapsed
    assert 0 <= metrics["validation"]["pgd"] <= metrics["validation"]["clean"] <= 1
    assert metrics["cost"]["parameters"] == sum(parameter.numel() for parameter in found.model.parameters())
    rows = paths.plots("baseline", name).read_text().splitlines()
    assert len(rows) - 1 == found.header.params["recipe"]["epochs"]
    assert metrics["cost"]["learning"] == 100 * (len(rows) - 1)
    sidecar = json.loads(artifacts.sidecar_path(paths.artifact("baseline", name)).read_text())
    assert sidecar["peak_memory"] > 2**20
    assert "peak_memory" not in json.dumps(found.header.model_dump())


@every_entry
def test_the_header_says_what_it_was_made_from(pipeline: Path, name: str) -> None:
    del pipeline
    header = artifacts.load(paths.artifact("baseline", name)).header
    data = artifacts.load(paths.DATASET).header.sha256
    experts = {f"expert {each}": artifacts.load(paths.artifact("pretrain", each)).header.sha256 for each in EXPERTS}
    joint = {"mixture": artifacts.load(paths.MIXTURE).header.sha256}
    assert header.inputs == {"dataset": data} | (
        experts if name in OF_EXPERTS else joint if name == "distilled" else {}
    )
    comparator = specs.load(f"baseline.{name}").model_dump(mode="json")
    assert header.params["comparator" if name in OF_EXPERTS else "student"] == comparator
    assert header.params["epsilon"] == (None if name == "standard" else 0.1)


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_mixtures_of_others_pay_for_the_experts(pipeline: Path, name: str) -> None:
    del pipeline
    cost = files.read_json(paths.metrics("baseline", name))["cost"]
    before = [files.read_json(paths.metrics("pretrain", each))["cost"]["total_training_flops"] for each in EXPERTS]
    assert cost["total_training_flops"] == cost["training_flops"] + sum(before)
    assert min(before) > 0
    assert artifacts.load(paths.artifact("baseline", name)).header.params["recipe"]["epochs"] == 1


def test_a_distilled_network_pays_for_its_teacher(pipeline: Path) -> None:
    del pipeline
    own, plain = (files.read_json(paths.metrics("baseline", name))["cost"] for name in ("distilled", "adversarial"))
    before = files.read_json(paths.metrics("train", "mixture"))["cost"]["total_training_flops"]
    assert own["total_training_flops"] == own["training_flops"] + before
    # of one more pass through the student and one through the teacher, beside an attack that is the same
    assert own["training_flops"] > plain["training_flops"]
    assert own["flops_per_image"] == plain["flops_per_image"]
    assert artifacts.load(paths.artifact("baseline", "distilled")).header.params["recipe"]["epochs"] == 2 + 1


def test_plain_networks_have_the_epochs_of_both_phases(pipeline: Path) -> None:
    del pipeline
    for name in ("standard", "adversarial", "trades", "equal-parameters", "resnet50"):
        header = artifacts.load(paths.artifact("baseline", name)).header
        assert header.params["recipe"]["epochs"] == 2 + 1
        assert header.metrics["cost"]["total_training_flops"] == header.metrics["cost"]["training_flops"]


def backbone_of(name: str) -> BackboneSettings:
    return classifiers.load(paths.artifact("baseline", name)).about.architecture.backbone


def test_backbones_are_those_asked_for(pipeline: Path) -> None:
    del pipeline
    assert backbone_of("standard") == BackboneSettings(kind="cnn", width=2)
    assert backbone_of("resnet50") == BackboneSettings(kind="resnet50", width=2)
    mixture = specs.paper_mixture(BackboneSettings(kind="cnn", width=2), load_section("train", JointConfig))
    assert backbone_of("equal-parameters") == specs.match_parameters("cnn", mixture, dataset.load(paths.DATASET).facts)
    assert backbone_of("equal-parameters").width > 2


def test_the_long_one_spends_what_the_mixture_would(pipeline: Path) -> None:
    """Beside `uniform`, which is the mixture but for its gate, whose passes are few."""
    del pipeline
    long, uniform = (files.read_json(paths.metrics("baseline", name))["cost"] for name in ("equal-passes", "uniform"))
    epoch = long["training_flops"] / (long["learning"] / 100)
    assert long["learning"] > 300
    assert uniform["total_training_flops"] - epoch / 2 < long["total_training_flops"]
    assert long["total_training_flops"] < 2 * uniform["total_training_flops"]


@every_entry
def test_predict_and_inspect_know_every_kind(pipeline: Path, advmoe: Advmoe, name: str) -> None:
    image = pipeline / "digit.png"
    pixels = dataset.load(paths.DATASET)["test"].images[0, 0]
    Image.fromarray(pixels.numpy()).save(image)
    path = paths.artifact("baseline", name)
    said = advmoe("predict", image, "--model", path)
    assert said.code == 0, said.err
    assert ("gate weight" in said.out) == (name in OF_EXPERTS)
    (found,) = predict(classifiers.load(path), [image])
    assert found.label in said.out
    assert [vote.expert for vote in found.expert_predictions] == (EXPERTS if name in OF_EXPERTS else [])
    if found.expert_predictions:
        assert sum(vote.weight for vote in found.expert_predictions) == pytest.approx(1.0, abs=1e-5)
    told = advmoe("inspect", path)
    assert json.loads(told.out)["metrics"]["cost"]["total_training_flops"] > 0


@pytest.mark.parametrize("name", ["equal-passes", "uniform"])
def test_an_expert_of_before_the_counting_is_refused(pipeline: Path, name: str) -> None:
    path = paths.artifact("pretrain", "pgd-1")
    expert = classifiers.load(path)
    classifiers.save(
        path,
        expert.model,
        expert.about.architecture,
        expert.about.facts,
        params=expert.header.params,
        inputs=expert.header.inputs,
        seed=0,
        metrics={"validation": {}, "alarms": []},
        seconds=0.0,
    )
    before = paths.artifact("baseline", name).read_bytes()
    with pytest.raises(UserError, match=r"^\S*pgd-1\S*: does not hold its training cost; run `dvc repro` "):
        baseline.run(name)
    assert (pipeline / paths.artifact("baseline", name)).read_bytes() == before


@pytest.mark.parametrize("spoil", ["missing", "of other data"])
def test_without_its_teacher_nothing_is_distilled(
    pipeline: Path, edit: Callable[[dict[str, Any]], None], advmoe: Advmoe, spoil: str
) -> None:
    before = paths.artifact("baseline", "distilled").read_bytes()
    if spoil == "missing":
        paths.MIXTURE.unlink()
    else:
        edit({"seed": 1})
        prepare.run()
    ran = advmoe("baseline", "distilled")
    assert ran.code == 2
    said = "no such file" if spoil == "missing" else "trained on other data than artifacts/prepare/dataset.safetensors"
    assert ran.err.startswith(f"error: {paths.MIXTURE}: {said}")
    assert (pipeline / paths.artifact("baseline", "distilled")).read_bytes() == before


@pytest.mark.parametrize("name", ["equal-passes", "uniform"])
def test_experts_of_other_data_are_refused(pipeline: Path, edit: Callable[[dict[str, Any]], None], name: str) -> None:
    del pipeline
    edit({"seed": 1})
    prepare.run()
    with pytest.raises(UserError, match=r"^artifacts/pretrain/clean.safetensors: trained on other data than "):
        baseline.run(name)


@pytest.mark.parametrize("name", ["equal-passes", "soe"])
def test_missing_experts_are_named(pipeline: Path, advmoe: Advmoe, name: str) -> None:
    (pipeline / paths.artifact("pretrain", "pgd-1")).unlink()
    ran = advmoe("baseline", name)
    assert ran.code == 2
    assert ran.err.startswith("error: artifacts/pretrain/pgd-1.safetensors: no such file")


@every_entry
def test_the_command_writes_the_same_file_again(pipeline: Path, advmoe: Advmoe, name: str) -> None:
    del pipeline
    path = paths.artifact("baseline", name)
    before = path.read_bytes()
    path.unlink()
    ran = advmoe("baseline", name)
    assert ran.code == 0, ran.err
    assert f"written to {path}" in " ".join(ran.out.split())
    assert path.read_bytes() == before

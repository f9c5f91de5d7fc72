"""Recipes of training beside the paper's: losses and attacks against the same formula written out image by image, and
against cases whose value is known.

Shapes: B batch, C channel, H/W pixels, E experts, K classes.
"""

import math

import pytest
import torch
from pydantic import ValidationError
from tiny import EPSILON, FACTS, JOINT, RECIPE, patterned_set
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.ball import LInf
from advmoe.attacks.random_streams import BatchStream
from advmoe.core.errors import UserError
from advmoe.models.classifiers import BackboneSettings, MixtureArchitecture, build
from advmoe.models.mixture import MixtureOfExperts, MixtureOutput, mix
from advmoe.runtime.machine import generator
from advmoe.training.batch_attacks import (
    NFgsmBatches,
    PgdAtRadii,
    PgdBatches,
    TradesBatches,
    draw_attack,
    expected_passes,
)
from advmoe.training.job import TrainingJob
from advmoe.training.joint import JointConfig, MixtureTask, load_imbalance
from advmoe.training.losses.adp import JITTER, Adp, adp_loss, diversity, log_volume
from advmoe.training.losses.batch import Batch
from advmoe.training.losses.dwf import Dwf
from advmoe.training.losses.igat import Igat, igat_loss
from advmoe.training.losses.mart import Mart, boosted_cross_entropy, mart_loss
from advmoe.training.losses.mart_adp import MartAdp, mart_adp_loss
from advmoe.training.losses.mutual import Mutual, mutual_loss
from advmoe.training.losses.registry import Objective
from advmoe.training.nfgsm import NFgsm, nfgsm
from advmoe.training.single import NetworkSpec, SingleConfig, SingleRun, train_single
from advmoe.training.trainer import fit

MART = Mart(kind="mart", weight=5.0)
ADP = Adp(kind="adp", alpha=2.0, beta=0.5)
IGAT = Igat(kind="igat", alpha=0.25, beta=0.5)
MUTUAL = Mutual(kind="mutual", weight=1.5)
DWF = Dwf(kind="dwf")
MART_ADP = MartAdp(kind="mart-adp", alpha=2.0, beta=0.5, weight=5.0)
ALL = (DWF, MART, ADP, MART_ADP, IGAT, MUTUAL)
SMALL = {"alpha": 0.2, "beta": 0.05}  # two experts have two wrong classes to differ in, and soon agree on one of them
GENTLE = (DWF, MART, ADP.model_copy(update=SMALL), MART_ADP.model_copy(update=SMALL), IGAT, MUTUAL)
PGD = PgdBatches(kind="pgd", steps=(2,), step_size=0.5)
NFGSM = NFgsmBatches(kind="n-fgsm", noise=2.0, step_size=1.0)
RADII = PgdAtRadii(kind="pgd-radii", radii=(0.5, 1.5), steps=(1, 2, 6), step_size=0.5)
BATCH, EXPERTS, CLASSES = 7, 3, 5


def stream(*parts: object) -> torch.Generator:
    return generator("test_objectives", *parts)


def logits(name: str, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=stream(name))


def log_probs(name: str) -> Tensor:
    return logits(name, BATCH, CLASSES).log_softmax(dim=1)


LABELS = torch.arange(BATCH) % CLASSES


def recipe(**changes: object) -> JointConfig:
    return JointConfig.model_validate(RECIPE | JOINT | {"adversary": PGD} | changes)


def mixture() -> MixtureOfExperts:
    plan = MixtureArchitecture(
        kind="mixture",
        backbone=BackboneSettings(kind="resnet18", width=2),
        experts=("left", "right"),
        gate=JOINT["gate"],
        mixing="probabilities",
    )
    made = build(plan, FACTS, 0)
    assert isinstance(made, MixtureOfExperts)
    return made


# ---- MART


def test_mart_is_its_formula_image_by_image() -> None:
    clean_BK, attacked_BK = log_probs("clean"), log_probs("attacked")
    each = []
    for clean, attacked, label in zip(clean_BK.exp(), attacked_BK.exp(), LABELS, strict=True):
        strongest = max(float(p) for k, p in enumerate(attacked) if k != label)
        bce = -math.log(attacked[label]) - math.log(1 - strongest)
        kl = float((clean * (clean.log() - attacked.log())).sum())
        each.append(bce + MART.weight * kl * (1 - float(clean[label])))
    assert float(mart_loss(clean_BK, attacked_BK, LABELS, MART.weight)) == pytest.approx(sum(each) / BATCH, rel=1e-5)


def test_mart_stays_finite_where_a_wrong_class_is_certain() -> None:
    certain_BK = torch.tensor([[0.0, 60.0, -60.0]], requires_grad=True)
    loss = boosted_cross_entropy(certain_BK.log_softmax(dim=1), torch.tensor([0])).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    # -log p_y is 60, and 1 - p of the wrong class is p_y (the third is nothing): 60 again
    assert loss.item() == pytest.approx(120, rel=1e-5)
    assert certain_BK.grad is not None
    assert certain_BK.grad.isfinite().all()


# ---- ADP


def test_volume_of_experts_at_right_angles_is_1() -> None:
    """Each expert gives all it has left to another wrong class: three unit vectors at right angles."""
    logits_BEK = torch.full((1, 3, 4), -30.0)
    for expert in range(3):
        logits_BEK[0, expert, 1 + expert] = 30.0
    assert float(log_volume(logits_BEK, torch.tensor([0]))) == pytest.approx(0, abs=1e-4)


def test_volume_of_two_experts_is_the_squared_sine_between_them() -> None:
    logits_BEK = logits("experts", BATCH, 2, CLASSES)
    for image, label in enumerate(LABELS):
        left, right = (
            torch.tensor([float(p) for k, p in enumerate(row.softmax(0)) if k != label]) for row in logits_BEK[image]
        )
        cosine = float(functional.cosine_similarity(left, right, dim=0))
        found = float(log_volume(logits_BEK[image : image + 1], LABELS[image : image + 1]))
        assert found == pytest.approx(math.log(1 - cosine**2), rel=1e-3, abs=1e-3)


def test_experts_that_agree_leave_a_finite_loss_and_slope() -> None:
    logits_BEK = logits("experts", BATCH, 1, CLASSES).expand(-1, EXPERTS, -1).clone().requires_grad_()
    volume_B = log_volume(logits_BEK, LABELS)
    volume_B.sum().backward()  # type: ignore[no-untyped-call]
    assert volume_B.max().item() < (EXPERTS - 1) * math.log(10 * JITTER)
    assert logits_BEK.grad is not None
    assert logits_BEK.grad.isfinite().all()


def test_adp_is_what_the_experts_lose_less_entropy_and_volume() -> None:
    logits_BEK = logits("experts", BATCH, EXPERTS, CLASSES)
    lost = sum(float(functional.cross_entropy(logits_BEK[:, expert], LABELS)) for expert in range(EXPERTS))
    average_BK = logits_BEK.softmax(dim=2).mean(dim=1)
    entropy = -float((average_BK * average_BK.log()).sum(dim=1).mean())
    volume = float(log_volume(logits_BEK, LABELS).mean())
    assert float(adp_loss(logits_BEK, LABELS, ADP)) == pytest.approx(lost - 2 * entropy - 0.5 * volume, rel=1e-5)


def test_adp_refuses_more_experts_than_wrong_classes() -> None:
    with pytest.raises(UserError, match="at most 4 experts for 5 classes"):
        adp_loss(logits("experts", BATCH, 5, CLASSES), LABELS, ADP)


@pytest.mark.parametrize("objective", [ADP, MART_ADP], ids=lambda objective: objective.kind)
def test_gate_learns_to_trust_the_expert_that_knows_and_not_the_one_that_is_unsure(objective: Adp | MartAdp) -> None:
    """One expert is right and sure, the other knows nothing: entropy of a gate's answer would send it to the latter."""
    log_gate_BE = torch.full((1, 2), -math.log(2), requires_grad=True)
    logits_BEK = torch.tensor([[[8.0, 0.0, 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    parts = MixtureOutput(mix(log_gate_BE, logits_BEK, "probabilities"), log_gate_BE, logits_BEK)
    made, images = mixture().eval(), torch.rand(1, 1, 8, 8, generator=stream("images"))
    batch = Batch(made, parts, torch.tensor([0]), images)
    objective.loss(batch).backward()  # type: ignore[no-untyped-call]
    assert log_gate_BE.grad is not None
    knows, unsure = log_gate_BE.grad[0].tolist()
    assert knows < unsure <= 0


# ---- MART and ADP


def test_mart_adp_is_what_the_experts_lose_by_mart_less_entropy_and_volume() -> None:
    clean_BEK, logits_BEK = (logits(name, BATCH, EXPERTS, CLASSES) for name in ("clean experts", "experts"))
    lost = sum(
        float(mart_loss(clean_BEK[:, e].log_softmax(dim=1), logits_BEK[:, e].log_softmax(dim=1), LABELS, 5.0))
        for e in range(EXPERTS)
    )
    apart = float(diversity(logits_BEK, LABELS, MART_ADP))
    assert float(mart_adp_loss(clean_BEK, logits_BEK, LABELS, MART_ADP)) == pytest.approx(lost - apart, rel=1e-5)


# ---- iGAT


def test_igat_is_the_plain_loss_where_nothing_is_fooled() -> None:
    answer_BK = functional.one_hot(LABELS, CLASSES).float().mul(3).log_softmax(dim=1)
    found = igat_loss(answer_BK, logits("experts", BATCH, EXPERTS, CLASSES), LABELS, IGAT)
    torch.testing.assert_close(found, functional.nll_loss(answer_BK, LABELS))


def test_igat_is_its_formula_image_by_image() -> None:
    answer_BK, logits_BEK = log_probs("answer"), logits("experts", BATCH, EXPERTS, CLASSES)
    total, fooled = 0.0, 0
    for answer, votes, label in zip(answer_BK, logits_BEK.softmax(dim=2), LABELS, strict=True):
        total -= float(answer[label])
        if int(answer.argmax()) == label:
            continue
        fooled += 1
        order = sorted(range(EXPERTS), key=lambda expert: float(votes[expert][label]))  # the best comes last
        dealt = sum(-math.log(votes[expert][label]) * 2**rank / 7 for rank, expert in enumerate(order))
        surest = max(float(vote[k]) for vote in votes for k in range(CLASSES) if k != label)
        total += 0.25 * dealt - 0.5 * math.log(1 - surest)
    assert 0 < fooled < BATCH
    assert float(igat_loss(answer_BK, logits_BEK, LABELS, IGAT)) == pytest.approx(total / BATCH, rel=1e-5)


def test_igat_holds_down_an_expert_however_sure_it_is_of_a_wrong_class() -> None:
    logits_BEK = torch.tensor([[[0.0, 200.0], [0.0, 1.0]]], requires_grad=True)
    loss = igat_loss(torch.tensor([[-5.0, -0.01]]), logits_BEK, torch.tensor([0]), IGAT)
    loss.backward()  # type: ignore[no-untyped-call]
    # dealt: a third of 200 and two thirds of 1.31; worst: -log(1 - p) of the first expert's wrong class is 200
    expected = 5 + 0.25 * (200 / 3 + 2 / 3 * math.log(1 + math.e)) + 0.5 * 200
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits_BEK.grad is not None
    assert float(logits_BEK.grad[0, 0, 1]) == pytest.approx(0.25 / 3 + 0.5, rel=1e-4)


# ---- mutual


def test_mutual_is_the_mean_divergence_of_the_experts_from_the_clean_answer() -> None:
    clean_BK, attacked_BK = log_probs("clean"), log_probs("attacked")
    logits_BEK = logits("experts", BATCH, EXPERTS, CLASSES)
    each = [
        float((p * (p.log() - vote.softmax(0).log())).sum())
        for p, votes in zip(clean_BK.exp(), logits_BEK, strict=True)
        for vote in votes
    ]
    expected = float(functional.nll_loss(attacked_BK, LABELS)) + 1.5 * sum(each) / len(each)
    found = float(mutual_loss(clean_BK, attacked_BK, logits_BEK, LABELS, MUTUAL))
    assert found == pytest.approx(expected, rel=1e-5)


def test_mutual_tells_the_experts_and_not_the_mixture() -> None:
    clean_BK = log_probs("clean").requires_grad_()
    logits_BEK = logits("experts", BATCH, EXPERTS, CLASSES).requires_grad_()
    mutual_loss(clean_BK, log_probs("attacked"), logits_BEK, LABELS, MUTUAL).backward()  # type: ignore[no-untyped-call]
    assert clean_BK.grad is None
    assert logits_BEK.grad is not None
    assert (logits_BEK.grad.abs().amax(dim=(0, 2)) > 0).all()


# ---- as the mixture's recipe


def _expected(said: MixtureOutput, clean: MixtureOutput, labels_B: Tensor, objective: Objective) -> Tensor:
    answer_BK, logits_BEK = said.log_probs_BK, said.logits_BEK
    match objective:
        case Dwf():
            return functional.nll_loss(answer_BK, labels_B)
        case Mart():
            return mart_loss(clean.log_probs_BK, answer_BK, labels_B, objective.weight)
        case Adp():
            return adp_loss(logits_BEK, labels_B, objective) + functional.nll_loss(answer_BK, labels_B)
        case MartAdp():
            lost = mart_adp_loss(clean.logits_BEK, logits_BEK, labels_B, objective)
            return lost + functional.nll_loss(answer_BK, labels_B)
        case Igat():
            return igat_loss(answer_BK, logits_BEK, labels_B, objective)
        case Mutual():
            return mutual_loss(clean.log_probs_BK, answer_BK, logits_BEK, labels_B, objective)


@pytest.mark.parametrize("objective", ALL, ids=lambda objective: objective.kind)
def test_learner_takes_the_loss_that_the_recipe_names(objective: Objective) -> None:
    made, data = mixture().eval(), patterned_set(stream)["train"].first(9)
    clean, labels = data.pixels(), data.labels
    attacked = (clean + 0.1 * torch.rand(clean.shape, generator=stream("noise"))).clamp(0, 1)
    parts = made.forward_parts(attacked)
    expected = _expected(parts, made.forward_parts(clean), labels, objective) + 0.01 * load_imbalance(parts.log_gate_BE)
    found = MixtureTask(made, recipe(recipe=objective)).loss(attacked, labels, clean)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("objective", GENTLE, ids=lambda objective: objective.kind)
def test_mixture_learns_by_every_recipe(objective: Objective) -> None:
    slow = RECIPE["optimizer"].model_copy(update={"lr": 0.02})  # a sum over experts moves each as far as all others do
    told = recipe(recipe=objective, epochs=12, optimizer=slow)
    job = TrainingJob("tiny", 0, patterned_set(stream), told, PGD, EPSILON, "pgd")
    history = fit(MixtureTask(mixture(), told), job).history
    assert history[-1]["clean"] > 0.6  # a third is chance
    assert history[-1]["loss"] < history[0]["loss"]


def test_trades_and_another_loss_of_the_answer_exclude_each_other() -> None:
    trades = TradesBatches(kind="trades", steps=(1,), step_size=0.5, beta=6.0)
    assert recipe(adversary=trades, recipe="dwf").recipe == DWF
    with pytest.raises(ValidationError, match="recipe mart and adversary trades each define the mixture's loss"):
        recipe(adversary=trades, recipe=MART)


# ---- N-FGSM


class Linear(nn.Module):
    """Two logits, x . w and 0: cross-entropy of class 0 rises along -w, everywhere."""

    def __init__(self, weights_CHW: Tensor) -> None:
        super().__init__()
        self.weights_CHW = weights_CHW

    def forward(self, images_BCHW: Tensor) -> Tensor:
        score_B = (images_BCHW * self.weights_CHW).flatten(1).sum(dim=1)
        return torch.stack([score_B, torch.zeros_like(score_B)], dim=1)


def test_nfgsm_is_noise_and_a_step_and_leaves_the_ball() -> None:
    weights = torch.randn((1, 8, 8), generator=stream("weights"))
    images = torch.full((5, 1, 8, 8), 0.5)
    settings = NFgsm(kind="n-fgsm", noise=2.0, step_size=1.0)
    found = nfgsm(
        Linear(weights),
        images,
        torch.zeros(5, dtype=torch.int64),
        ball=LInf(0.1),
        settings=settings,
        draws=BatchStream(stream("noise")),
    )
    noise = 0.2 * BatchStream(stream("noise")).uniform(images)
    torch.testing.assert_close(found, images + noise - 0.1 * weights.sign())
    assert 0.25 < float((found - images).abs().max()) <= 0.3 + 1e-6


def test_nfgsm_stays_inside_the_pixel_range_and_takes_its_gradient_at_the_noise() -> None:
    class Bent(Linear):
        """Its slope changes sign at a score of 0: the gradient at the image is not the one at the noise."""

        def forward(self, images_BCHW: Tensor) -> Tensor:
            return super().forward(images_BCHW).abs()

    images = torch.rand((64, 1, 1, 1), generator=stream("images"))
    model = Bent(torch.ones(1, 1, 1))
    labels = torch.zeros(64, dtype=torch.int64)
    settings = NFgsm(kind="n-fgsm", noise=3.0, step_size=1.0)
    found = nfgsm(model, images, labels, ball=LInf(0.3), settings=settings, draws=BatchStream(stream("noise")))
    around = images + 0.9 * BatchStream(stream("noise")).uniform(images)
    assert (around < 0).any()
    torch.testing.assert_close(found, (around - 0.3 * around.sign()).clamp(0, 1))


def test_an_expert_learns_from_nfgsm() -> None:
    drawn = draw_attack(NFGSM, 0.2, stream("draws"))
    assert drawn is not None
    assert (drawn.settings, drawn.ball) == (NFgsm(kind="n-fgsm", noise=2.0, step_size=1.0), LInf(0.2))
    assert expected_passes(NFGSM) == 1
    student = NetworkSpec(adversary=NFGSM, seed=1)
    assert student.uses_threat_epsilon
    told = SingleConfig.model_validate(RECIPE | {"epochs": 6, "validation_epsilon": EPSILON})
    backbone = BackboneSettings(kind="resnet18", width=2)
    trained = train_single(SingleRun("tiny", student, backbone, patterned_set(stream), told, seed=0, epsilon=EPSILON))
    assert trained.history[-1]["pgd"] > 0.6  # a third is chance
    images = 6 * 48
    assert (trained.cost.crafting_forward, trained.cost.crafting_backward) == (images, images)


# ---- experts at radii of their own


def test_radius_is_drawn_relative_to_epsilon() -> None:
    draws = [draw_attack(RADII, 0.2, stream("draws", number)) for number in range(40)]
    assert {round(each.ball.epsilon, 6) for each in draws if each is not None} == {0.1, 0.3}
    assert {each.settings.steps for each in draws if each is not None and each.settings.kind == "pgd"} == {1, 2, 6}
    assert expected_passes(RADII) == 3


def test_expert_at_radii_meets_the_threat_model() -> None:
    assert NetworkSpec(adversary=RADII, seed=1).uses_threat_epsilon

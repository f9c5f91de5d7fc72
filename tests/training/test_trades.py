"""TRADES: its loss against numbers worked out by hand, its attack against closed forms on linear softmax models.

Shapes: B batch, C channel, H/W pixels, D pixels of an image in one row, K classes.
"""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import craft
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.random_streams import BatchStream, ImageStreams
from advmoe.data.batches import Augmentation
from advmoe.data.dataset import Dataset, DatasetInfo, Split
from advmoe.models import classifiers, inference
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.machine import generator
from advmoe.training import trainer
from advmoe.training.batch_attacks import (
    BatchAttack,
    MixedBatches,
    PgdBatches,
    TradesBatches,
    draw_attack,
    expected_passes,
)
from advmoe.training.config import Optimizer, Schedule, TrainingConfig
from advmoe.training.flops import FlopsPerImage
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.single import NetworkSpec, PlainTask, TradesTask, task_for
from advmoe.training.trades import START_STD, Trades, kl_divergence, trades, trades_loss
from advmoe.training.trainer import fit

FACTS = DatasetInfo(channels=1, height=8, width=8, class_names=("a", "b", "c"), mean=(0.5,), std=(0.25,))
EPSILON = 0.05
BALL = LInf(EPSILON)
SHAPE = (12, 1, 4, 4)
BATCHES = TradesBatches(kind="trades", steps=(1, 2, 4), step_size=0.5, beta=6.0)
PGD = PgdBatches(kind="pgd", steps=(2,), step_size=0.5)


def stream(*parts: object) -> torch.Generator:
    return generator("test_trades", *parts)


def draws() -> BatchStream:
    """The same stream from its beginning each time."""
    return BatchStream(stream("attack"))


def ascent(steps: int = 10, step_size: float = 0.25) -> Trades:
    return Trades(kind="trades", steps=steps, step_size=step_size)


def pixels(shape: tuple[int, ...] = SHAPE, low: float = 0.3, high: float = 0.7) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=stream("pixels"))


def labels(count: int = SHAPE[0]) -> Tensor:
    return torch.arange(count) % 3


class Linear(nn.Module):
    """Logits W x, without a bias."""

    def __init__(self, classes: int, scale: float = 1.0) -> None:
        super().__init__()
        weights = scale * torch.randn(classes, math.prod(SHAPE[1:]), generator=stream("linear", classes))
        self.weights_KD = nn.Parameter(weights, requires_grad=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1) @ self.weights_KD.T


def start(images_BCHW: Tensor, ball: Ball = BALL) -> Tensor:
    return ball.project(images_BCHW + START_STD * draws().normal(images_BCHW), images_BCHW)


def attack(model: nn.Module, images: Tensor, settings: Trades | None = None, ball: Ball = BALL) -> Tensor:
    return trades(model, images, labels(len(images)), ball=ball, settings=settings or ascent(), draws=draws())


# ---- the loss


def test_divergence_is_the_sum_of_p_log_p_over_q_with_the_clean_probabilities_in_front() -> None:
    clean, attacked = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.5)
    backwards = 0.25 * math.log(0.25 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.5 * math.log(0.5 / 0.1)
    assert abs(expected - backwards) > 0.01  # the direction can be told
    assert float(kl_divergence(clean.log(), attacked.log())) == pytest.approx(expected, abs=1e-6)


def test_divergence_takes_logits_as_well_as_log_probabilities() -> None:
    clean_BK, attacked_BK = (3 * torch.randn(5, 4, generator=stream("logits", name)) for name in ("clean", "attacked"))
    normalised = kl_divergence(clean_BK.log_softmax(1), attacked_BK.log_softmax(1))
    assert torch.allclose(kl_divergence(clean_BK + 7, attacked_BK - 3), normalised, atol=1e-5)
    assert normalised.shape == (5,)
    assert (normalised > 0).all()
    assert torch.equal(kl_divergence(clean_BK, clean_BK), torch.zeros(5))


def test_divergence_of_certainties_stays_finite() -> None:
    sure, otherwise = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert float(kl_divergence(sure, otherwise)) == pytest.approx(200.0)


def test_loss_is_clean_cross_entropy_plus_beta_times_the_mean_divergence() -> None:
    clean = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    attacked = torch.tensor([[0.3, 0.3, 0.4], [0.5, 0.1, 0.4]])
    entropy = -(math.log(0.6) + math.log(0.2)) / 2  # labels 0 and 1
    first = 0.6 * math.log(2.0) + 0.1 * math.log(0.25)
    second = 0.2 * math.log(0.4) + 0.2 * math.log(2.0) + 0.6 * math.log(1.5)
    for beta in (0.5, 6.0):
        found = trades_loss(clean.log(), attacked.log(), torch.tensor([0, 1]), beta)
        assert float(found) == pytest.approx(entropy + beta * (first + second) / 2, abs=1e-6)


def test_both_passes_receive_the_gradient_of_their_closed_forms() -> None:
    """d KL / d attacked logits = q - p; the clean logits learn from both terms and are not held still."""
    clean, attacked = (torch.randn(4, 3, generator=stream("both", name)).requires_grad_() for name in "ca")
    beta, target = 3.0, torch.tensor([0, 1, 2, 0])
    trades_loss(clean, attacked, target, beta).backward()  # type: ignore[no-untyped-call]
    p, q = clean.detach().softmax(1), attacked.detach().softmax(1)
    ratio = (p / q).log()
    of_divergence = p * (ratio - (p * ratio).sum(1, keepdim=True))
    of_entropy = p - nn.functional.one_hot(target, 3)
    assert attacked.grad is not None
    assert clean.grad is not None
    torch.testing.assert_close(attacked.grad, beta * (q - p) / 4)
    torch.testing.assert_close(clean.grad, (of_entropy + beta * of_divergence) / 4)


# ---- the attack


def test_two_classes_move_every_pixel_by_epsilon_along_the_weights_difference() -> None:
    """With two classes the slope is a multiple of w_1 - w_0, of the sign that the first noise decides on."""
    model, images = Linear(2), pixels()
    apart_D = model.weights_KD[1] - model.weights_KD[0]
    noise_BD = (start(images) - images).flatten(1)
    side_B1 = (noise_BD @ apart_D).sign()[:, None]
    assert set(side_B1.flatten().tolist()) == {-1.0, 1.0}
    found = (attack(model, images) - images).flatten(1)
    torch.testing.assert_close(found, EPSILON * side_B1 * apart_D.sign(), atol=1e-6, rtol=0)


def test_ascent_follows_the_slope_of_the_divergence_from_clean_to_attacked() -> None:
    """W^T (q - p) on a linear model; the slope of the divergence the other way round points elsewhere."""
    model, images, ball = Linear(3, scale=3.0), pixels(), LInf(0.2)
    weights, settings = model.weights_KD, ascent(steps=4, step_size=0.3)
    p_BK = model(images).softmax(1)

    def climbed(backwards: bool) -> Tensor:
        points = start(images, ball)
        for _ in range(settings.steps):
            q_BK = model(points).softmax(1)
            ratio_BK = (q_BK / p_BK).log()
            slope = q_BK * (ratio_BK - (q_BK * ratio_BK).sum(1, keepdim=True)) if backwards else q_BK - p_BK
            points = ball.project(points + 0.3 * 0.2 * (slope @ weights).sign().view_as(points), images)
        return points

    found = attack(model, images, settings, ball)
    torch.testing.assert_close(found, climbed(backwards=False), atol=1e-6, rtol=0)
    assert (found - climbed(backwards=True)).abs().max() > 0.1


def test_every_step_climbs() -> None:
    model, images = Linear(3), pixels()
    clean = model(images)
    climbed = [kl_divergence(clean, model(attack(model, images, ascent(steps, 0.2)))) for steps in (1, 2, 4)]
    assert (kl_divergence(clean, model(start(images))) < climbed[0]).all()
    assert (climbed[0] < climbed[1]).all()
    assert (climbed[1] < climbed[2]).all()


def test_labels_play_no_part() -> None:
    model, images = Linear(3), pixels()
    found = [
        trades(model, images, wrong, ball=BALL, settings=ascent(), draws=draws())
        for wrong in (labels(), (labels() + 1) % 3, torch.zeros(len(images), dtype=torch.long))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nobody_leaves_before_the_last_step() -> None:
    model, images = Linear(2), pixels()

    def everything_counts(points: Tensor, labels_b: Tensor) -> Tensor:
        raise AssertionError(f"asked about {len(points)} points and {len(labels_b)} labels")

    asked = trades(
        model, images, labels(), ball=BALL, settings=ascent(), draws=draws(), is_adversarial=everything_counts
    )
    assert torch.equal(asked, attack(model, images))


@pytest.mark.parametrize("ball", [LInf(0.05), LInf(0.5), LInf(0.0), L2(0.7)], ids=["linf", "wide", "none", "l2"])
@pytest.mark.parametrize("step_size", [0.25, 3.0])
def test_result_lies_in_ball_and_box(ball: Ball, step_size: float) -> None:
    images = pixels(low=0.0, high=1.0).round(decimals=1)  # some at the walls
    found = attack(Linear(3), images, ascent(5, step_size), ball)
    assert found.min() >= 0
    assert found.max() <= 1
    change = (found - images).flatten(1)
    assert (
        torch.linalg.vector_norm(change, math.inf if ball.norm == "linf" else 2, dim=1) <= ball.epsilon + 1e-6
    ).all()
    assert torch.equal(found, images) == (ball.epsilon == 0)


def test_start_is_normal_noise_of_a_thousandth_and_not_the_image() -> None:
    """At the image itself the divergence is flat: an ascent that began there would stay."""
    model, images, seen = Linear(3), pixels((400, 1, 4, 4)), list[Tensor]()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    attack(model, images, ascent(1))
    noise = seen[1] - images
    assert torch.equal(seen[0], images)
    assert float(noise.std()) == pytest.approx(1e-3, rel=0.05)
    assert abs(float(noise.mean())) < 1e-4
    assert float((noise.abs() > 2e-3).float().mean()) == pytest.approx(0.0455, abs=0.01)  # normal, not uniform


def test_an_image_finds_the_same_in_any_company() -> None:
    """Each image climbs its own divergence, from a stream of its own."""
    model, images = Linear(3), pixels()
    together = trades(
        model, images, labels(), ball=BALL, settings=ascent(), draws=ImageStreams(0, "trades", torch.arange(12))
    )
    alone = trades(
        model, images[5:6], labels(1), ball=BALL, settings=ascent(), draws=ImageStreams(0, "trades", torch.tensor([5]))
    )
    torch.testing.assert_close(together[5:6], alone, atol=1e-6, rtol=0)


def test_the_models_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    attack(model, pixels())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- batches


def make_model(seed: int = 0) -> nn.Module:
    return classifiers.build(
        PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="cnn", width=3)), FACTS, seed
    )


def make_split(count: int, name: str) -> Split:
    """Noisy copies of three fixed patterns."""
    patterns = torch.randint(40, 216, (3, 1, 8, 8), generator=stream("patterns"))
    noise = torch.randint(-30, 31, (count, 1, 8, 8), generator=stream("noise", name))
    numbers = torch.arange(count)
    return Split((patterns[numbers % 3] + noise).to(torch.uint8), numbers % 3, numbers)


def test_every_number_of_steps_occurs_at_the_epsilon_of_the_threat_model() -> None:
    source = stream("draw")
    counts = dict.fromkeys(BATCHES.steps, 0)
    for _ in range(300):
        drawn = draw_attack(BATCHES, EPSILON, source)
        assert drawn is not None
        assert isinstance(drawn.settings, Trades)
        assert (drawn.ball, drawn.settings.step_size) == (BALL, 0.5)
        counts[drawn.settings.steps] += 1
    assert min(counts.values()) > 70  # of 100 expected


def test_passes_are_expected_as_often_as_steps_are_drawn() -> None:
    assert expected_passes(BATCHES) == pytest.approx(7 / 3)


def test_mixed_batches_cannot_contain_trades() -> None:
    """It is a loss as much as an attack: a batch of it means something else to the task."""
    with pytest.raises(ValidationError, match=r"Input tag 'trades' .* does not match any of the expected tags"):
        MixedBatches.model_validate(
            {"kind": "mixed", "weights": [1, 1], "of": [PGD.model_dump(), BATCHES.model_dump()]}
        )


@pytest.mark.parametrize("change", [{"beta": 0}, {"steps": []}, {"steps": [0]}, {"step_size": 0}])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TradesBatches.model_validate(BATCHES.model_dump() | change)


def test_trades_meets_the_threat_model() -> None:
    assert NetworkSpec(adversary=BATCHES, seed=0).uses_threat_epsilon


def test_crafting_is_in_eval_mode_and_changes_no_buffer() -> None:
    model, images = make_model(), make_split(8, "crafted").pixels()
    model.train()(images)  # statistics other than 0 and 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = BatchAttack(ascent(3), BALL)
    found = craft(model, images, labels(8), drawn, draws())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(found, attack(model, images, ascent(3)), atol=1e-5, rtol=0)
    model.train()
    assert (found - attack(model, images, ascent(3))).abs().max() > 0.01  # train mode would have found other points


def test_work_of_crafting_is_one_clean_pass_and_one_of_each_kind_a_step() -> None:
    passes = engine.PassCount()
    craft(
        make_model(),
        make_split(8, "counted").pixels(),
        labels(8),
        BatchAttack(ascent(3), BALL),
        draws(),
        passes,
    )
    assert (passes.forward, passes.backward) == (8 * 4, 8 * 3)


# ---- the task


def make_recipe(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 8,
        "micro_batch": None,
        "optimizer": Optimizer(lr=0.05, momentum=0.9, weight_decay=0.0005),
        "schedule": Schedule(warmup=0.0, decay="constant"),
        "clip": 0.0,
        "ema": 0.0,
        "augmentation": Augmentation(crop=0, flip=False),
        "precision": "float32",
    }
    return TrainingConfig(**settings | changes)


def train(adversary: TradesBatches, **changes: Any) -> TrainingResult:
    recipe = make_recipe(**changes)
    data = Dataset({"train": make_split(48, "train")}, FACTS, "0" * 64)
    job = TrainingJob("trades", 0, data, recipe, adversary, EPSILON, "pgd")
    return fit(task_for(NetworkSpec(adversary=adversary, seed=0), make_model(), recipe), job)


def test_who_learns_by_trades_is_told_by_the_adversary() -> None:
    task = task_for(NetworkSpec(adversary=BATCHES, seed=0), make_model(), make_recipe())
    assert isinstance(task, TradesTask)
    assert task.beta == 6.0
    plain = task_for(NetworkSpec(adversary=PGD, seed=0), make_model(), make_recipe())
    assert type(plain) is PlainTask


def test_a_learning_step_passes_the_clean_batch_and_then_the_attacked_one() -> None:
    clean, attacked = make_split(8, "clean").pixels(), make_split(8, "attacked").pixels()
    model, twin = make_model(), make_model()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task = TradesTask(model.eval(), make_recipe(), beta=2.0)
    task.on_step_start()
    loss = task.loss(attacked, labels(8), clean)
    assert len(seen) == 2
    assert torch.equal(seen[0], clean)
    assert torch.equal(seen[1], attacked)
    assert model.training
    twin.train()
    expected = trades_loss(twin(clean), twin(attacked), labels(8), 2.0)
    assert torch.equal(loss, expected)
    assert all(torch.equal(left, right) for left, right in zip(model.buffers(), twin.buffers(), strict=True))


def test_training_hands_over_the_clean_images_of_the_very_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[tuple[Tensor, Tensor]] = []

    def watched(self: TradesTask, images: Tensor, labels_B: Tensor, clean: Tensor) -> Tensor:
        pairs.append((clean.clone(), images.clone()))
        return original(self, images, labels_B, clean)

    original = TradesTask.loss
    monkeypatch.setattr(trainer, "measure_flops", lambda *_: FlopsPerImage(1, 1, 1))  # else its steps would be seen
    monkeypatch.setattr(TradesTask, "loss", watched)
    train(BATCHES, augmentation=Augmentation(crop=1, flip=True))
    assert len(pairs) == 12
    for clean, attacked in pairs:
        change = (attacked - clean).abs()
        assert change.max() <= EPSILON + 1e-6
        assert change.flatten(1).amax(1).min() > EPSILON / 4  # attacked, all of them
        levels = clean * 255
        assert (levels - levels.round()).abs().max() < 1e-4


def test_beta_buys_stability() -> None:
    """The heavier the second term, the less the answers move under the same attack."""
    images = make_split(24, "test").pixels()

    def moved(beta: float) -> float:
        model = train(BATCHES.model_copy(update={"beta": beta}), epochs=6).model
        with torch.no_grad():
            clean = model(images)
        found = attack(model, images, ascent(8))
        return float(kl_divergence(clean, model(found)).mean().detach())

    assert moved(20.0) < 0.5 * moved(0.01)


def test_trades_learns_the_patterns_and_twice_the_same() -> None:
    first, second = train(BATCHES, epochs=12), train(BATCHES, epochs=12)
    tensors = second.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.model.state_dict().items())
    assert first.history[-1]["loss"] < 0.7 * first.history[0]["loss"]
    split = make_split(48, "train")
    right = inference.predict(first.model, split.pixels(), 48).argmax(1) == split.labels
    assert float(right.float().mean()) > 0.8

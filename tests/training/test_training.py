"""Training: what a batch is attacked with, the numbers of a recipe, the batches, the loop, and the alarms.

Shapes: B batch, N images, C channel, H/W pixels, E experts.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import CONSTANT, EPSILON, FACTS, JOINT, RECIPE, craft, patterned, patterned_set
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import BatchStream
from advmoe.core.errors import UserError
from advmoe.data.batches import Augmentation, augment, batch_indices, batches, batches_per_epoch
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers, gate_statistics, inference
from advmoe.models.classifiers import BackboneSettings, GateSettings, MixtureArchitecture, PlainArchitecture
from advmoe.models.gate import Gate
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import generator
from advmoe.training import crafting, joint, validation
from advmoe.training.batch_attacks import (
    Adversary,
    BatchAttack,
    CleanBatches,
    FgsmBatches,
    MixedBatches,
    PgdBatches,
    TradesBatches,
    draw_attack,
)
from advmoe.training.config import Optimizer, Schedule, ValidatedTrainingConfig, lr_factor, parameter_groups
from advmoe.training.job import Row, TrainingJob, TrainingResult
from advmoe.training.joint import JointConfig, JointRun, MixtureTask, train_mixture
from advmoe.training.losses.expert_losses import expert_cross_entropy
from advmoe.training.single import NetworkSpec, PlainTask, SingleConfig, SingleRun, baseline_config, train_single
from advmoe.training.trades import kl_divergence
from advmoe.training.trainer import fit

BACKBONE = BackboneSettings(kind="resnet18", width=2)
CLEAN = CleanBatches(kind="clean")
FGSM = FgsmBatches(kind="fgsm", epsilons=(0.01, 0.02, 0.03, 0.04))
PGD = PgdBatches(kind="pgd", steps=(1, 2, 3), step_size=0.5)
MIXED = MixedBatches(kind="mixed", weights=(1, 1, 1), of=(CLEAN, FGSM, PGD))
TRADES = TradesBatches(kind="trades", steps=(1, 2), step_size=0.5, beta=3.0)
OFF = Augmentation(crop=0, flip=False)
LONG = Pgd(kind="pgd", steps=6, step_size=0.5, restarts=1, loss="ce", targets=0)
BATCHES = 6  # of 8 images, in one epoch of the tiny set


def stream(*parts: object) -> torch.Generator:
    return generator("test_training", *parts)


def make_dataset() -> Dataset:
    return patterned_set(stream, train=8 * BATCHES)


def make_recipe(**changes: Any) -> ValidatedTrainingConfig:
    return ValidatedTrainingConfig(**RECIPE | changes)


def single_recipe(**changes: Any) -> SingleConfig:
    return SingleConfig(validation_epsilon=EPSILON, **RECIPE | changes)


def joint_recipe(**changes: Any) -> JointConfig:
    return JointConfig(**RECIPE | JOINT | {"adversary": MIXED} | changes)


def make_job(recipe: ValidatedTrainingConfig, adversary: Adversary = CLEAN, select_by: str = "clean") -> TrainingJob:
    return TrainingJob(
        name="tiny",
        seed=0,
        dataset=make_dataset(),
        config=recipe,
        adversary=adversary,
        epsilon=EPSILON,
        select_by=select_by,
    )


def make_model(seed: int = 0) -> nn.Module:
    return classifiers.build(PlainArchitecture(kind="plain", backbone=BACKBONE), FACTS, seed)


def train_plain(adversary: Adversary = CLEAN, select_by: str = "clean", **changes: Any) -> TrainingResult:
    recipe = make_recipe(**changes)
    return fit(PlainTask(make_model(), recipe), make_job(recipe, adversary, select_by))


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two networks are equal to the last bit, BatchNorm statistics included."""
    tensors = right.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in left.state_dict().items())


# ---- what a batch is attacked with


def many(adversary: Adversary, count: int = 400, seed: int = 0) -> list[BatchAttack | None]:
    source = stream("draw", seed)
    return [draw_attack(adversary, EPSILON, source) for _ in range(count)]


def test_clean_batches_are_not_attacked() -> None:
    assert set(many(CLEAN)) == {None}


def test_every_fgsm_epsilon_occurs() -> None:
    drawn = [each for each in many(FGSM) if each is not None]
    assert {each.ball.epsilon for each in drawn} == set(FGSM.epsilons)
    assert all(isinstance(each.settings, Fgsm) for each in drawn)
    counts = [sum(each.ball.epsilon == epsilon for each in drawn) for epsilon in FGSM.epsilons]
    assert min(counts) > 70  # of 100 expected: nothing is rare
    assert len(drawn) == 400


def test_every_number_of_pgd_steps_occurs_at_the_epsilon_of_the_threat_model() -> None:
    attacks = []
    for each in many(PGD):
        assert each is not None
        assert isinstance(each.settings, Pgd)
        assert each.ball.epsilon == EPSILON
        attacks.append(each.settings)
    assert {attack.steps for attack in attacks} == set(PGD.steps)
    assert {(each.step_size, each.restarts, each.loss, each.targets) for each in attacks} == {(0.5, 1, "ce", 0)}


def kinds(weights: tuple[float, ...]) -> dict[str, int]:
    found = {"clean": 0, "fgsm": 0, "pgd": 0}
    for each in many(MixedBatches(kind="mixed", weights=weights, of=(CLEAN, FGSM, PGD))):
        found["clean" if each is None else each.settings.kind] += 1
    return found


def test_mixed_batches_follow_their_weights() -> None:
    found = kinds((1, 2, 5))
    assert found["clean"] == pytest.approx(50, abs=20)
    assert found["fgsm"] == pytest.approx(100, abs=30)
    assert found["pgd"] == pytest.approx(250, abs=35)


@pytest.mark.parametrize("never", [0, 1, 2])
def test_mixed_batches_never_draw_weight_zero(never: int) -> None:
    weights = [1.0, 1.0, 1.0]
    weights[never] = 0.0
    counts = list(kinds(tuple(weights)).values())
    assert counts[never] == 0
    assert all(count > 0 for position, count in enumerate(counts) if position != never)


def test_mixed_batches_draw_within_their_kind() -> None:
    drawn = [each for each in many(MIXED) if each is not None]
    assert {each.ball.epsilon for each in drawn if isinstance(each.settings, Fgsm)} == set(FGSM.epsilons)
    assert {each.settings.steps for each in drawn if isinstance(each.settings, Pgd)} == set(PGD.steps)


def test_draws_follow_the_stream() -> None:
    assert many(MIXED) == many(MIXED)
    assert many(MIXED) != many(MIXED, seed=1)


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (1.0, -1.0), ()])
def test_mixed_batches_refuse_weights_that_do_not_fit(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        MixedBatches(kind="mixed", weights=weights, of=(CLEAN, FGSM))


Draw = Callable[[Adversary, float, torch.Generator], BatchAttack | None]


def once_per_run() -> Draw:
    """Planted: a draw at the start of the run, and never again."""
    drawn: list[BatchAttack | None] = []

    def planted(adversary: Adversary, epsilon: float, source: torch.Generator) -> BatchAttack | None:
        drawn.append(drawn[0] if drawn else draw_attack(adversary, epsilon, source))
        return drawn[-1]

    return planted


def once_per_epoch() -> Draw:
    """Planted: a draw at the start of every epoch."""
    drawn: list[BatchAttack | None] = []

    def planted(adversary: Adversary, epsilon: float, source: torch.Generator) -> BatchAttack | None:
        drawn.append(drawn[-1] if len(drawn) % BATCHES else draw_attack(adversary, epsilon, source))
        return drawn[-1]

    return planted


def is_drawn_per_batch(monkeypatch: pytest.MonkeyPatch, adversary: Adversary, epochs: int = 2) -> bool:
    """Trains for real, watching what each batch is crafted with: a fresh draw for all of them, in every epoch."""
    crafted: list[BatchAttack] = []
    attack_batch = engine.attack_batch

    def watched(model: nn.Module, images: Tensor, labels: Tensor, attack: Any, *, ball: Any, **rest: Any) -> Tensor:
        crafted.append(BatchAttack(attack.keywords["settings"], ball))
        return attack_batch(model, images, labels, attack, ball=ball, **rest)

    monkeypatch.setattr(engine, "attack_batch", watched)
    train_plain(adversary, epochs=epochs)
    assert len(crafted) == epochs * BATCHES
    by_epoch = [crafted[start : start + BATCHES] for start in range(0, len(crafted), BATCHES)]
    return all(any(each != epoch[0] for each in epoch) for epoch in by_epoch)


@pytest.mark.parametrize("adversary", [FGSM, PGD], ids=["fgsm", "pgd"])
def test_training_draws_per_batch(monkeypatch: pytest.MonkeyPatch, adversary: Adversary) -> None:
    assert is_drawn_per_batch(monkeypatch, adversary)


@pytest.mark.parametrize("bug", [once_per_run, once_per_epoch])
def test_drawing_less_often_is_caught(monkeypatch: pytest.MonkeyPatch, bug: Callable[[], Draw]) -> None:
    monkeypatch.setattr(crafting, "draw_attack", bug())
    assert not is_drawn_per_batch(monkeypatch, FGSM)


def test_clean_training_crafts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> Tensor:
        raise AssertionError(f"crafted for a clean batch: {len(args) + len(options)} arguments")

    monkeypatch.setattr(engine, "attack_batch", forbidden)
    train_plain(CLEAN, epochs=1)


@pytest.mark.parametrize("attack", [Fgsm(kind="fgsm"), LONG], ids=["fgsm", "pgd"])
def test_a_training_batch_gets_the_attack_as_it_was_drawn(attack: Fgsm | Pgd) -> None:
    model, images = make_model().eval(), patterned(stream, 8, "crafted").pixels()
    labels, ball = inference.predict(model, images, 8).argmax(1), LInf(EPSILON)
    found = craft(model, images, labels, BatchAttack(attack, ball), BatchStream(stream("craft")))
    with engine.attack_mode(model, "float32") as cheap:
        expected = BatchAttack(attack, ball).function(
            cheap, images, labels, ball=ball, draws=BatchStream(stream("craft"))
        )
    assert torch.equal(found, expected)
    assert not torch.equal(found, images)


def test_training_attacks_every_image_to_the_last_step() -> None:
    """Evaluation lets an image go when it has fallen; a network that learns should meet the worst that was found."""
    model, images = make_model().eval(), patterned(stream, 8, "crafted").pixels()
    labels = (inference.predict(model, images, 8).argmax(1) + 1) % 3  # fallen before the first step
    found = craft(model, images, labels, BatchAttack(LONG, LInf(EPSILON)), BatchStream(stream("craft")))
    at_the_wall = (found - images).abs() > 0.99 * EPSILON
    assert at_the_wall.double().mean() > 0.5


# ---- the numbers of a recipe


@pytest.mark.parametrize("decay", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_rate_rises_in_warm_up_and_never_again(decay: Any, warmup: float) -> None:
    rates = [lr_factor(Schedule(warmup=warmup, decay=decay), step, 50) for step in range(50)]
    assert all(0 < factor <= 1 for factor in rates)
    peak = int(warmup * 50)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_rate_warms_up_in_a_straight_line_to_the_peak() -> None:
    schedule = Schedule(warmup=0.2, decay="cosine")
    assert [lr_factor(schedule, step, 20) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_rate_of_cosine_is_half_in_the_middle_and_small_at_the_end() -> None:
    schedule = Schedule(warmup=0.0, decay="cosine")
    assert lr_factor(schedule, 0, 100) == 1.0
    assert lr_factor(schedule, 50, 100) == pytest.approx(0.5)
    assert lr_factor(schedule, 99, 100) < 0.001


def test_rate_of_constant_is_one_after_warm_up() -> None:
    assert {lr_factor(Schedule(warmup=0.1, decay="constant"), step, 20) for step in range(2, 20)} == {1.0}


def make_mixture() -> MixtureOfExperts:
    architecture = MixtureArchitecture(
        kind="mixture",
        backbone=BACKBONE,
        experts=("left", "right"),
        gate=GateSettings(width=2, temperature=1.0),
        mixing="probabilities",
    )
    return classifiers.build_mixture(architecture, FACTS, [make_model(1), make_model(2)], 0)


def test_weight_decay_spares_batch_norm_and_biases() -> None:
    model = make_mixture()
    settings = Optimizer(lr=0.1, momentum=0.9, weight_decay=0.01)
    decayed = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups([(model, 0.1)], settings)
        for parameter in group["params"]
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            spared = isinstance(module, nn.BatchNorm2d) or name == "bias"
            assert decayed.pop(id(parameter)) == (0.0 if spared else 0.01), f"{module} {name}"
    assert not decayed


def test_every_parameter_is_in_one_group_with_its_own_rate() -> None:
    model = make_mixture()
    optimizer = MixtureTask(model, joint_recipe(gate_lr=0.7)).optimizer()
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {rates[id(parameter)] for parameter in model.gate.parameters()} == {0.7}
    assert {rates[id(parameter)] for parameter in model.experts.parameters()} == {0.05}


def test_sgd_without_momentum_is_allowed() -> None:
    train_plain(epochs=1, optimizer=Optimizer(lr=0.01, momentum=0.0, weight_decay=0.0))


# ---- batches


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_batch_indices_cover_everything_once_in_batches_of_nearly_equal_size(batch_size: int) -> None:
    for count in range(2, 140):
        indices = batch_indices(count, batch_size, stream("indices", count))
        sizes = [len(index) for index in indices]
        assert sorted(torch.cat(indices).tolist()) == list(range(count))
        assert len(indices) == batches_per_epoch(count, batch_size)
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2, f"{count} images in batches of {batch_size}"


def test_smallest_batch_size_leaves_no_image_alone() -> None:
    assert min(len(index) for index in batch_indices(9, make_recipe(batch_size=2).batch_size, stream("pair"))) >= 2


def test_a_network_ruined_by_its_very_last_update_is_refused() -> None:
    wild = single_recipe(epochs=1, batch_size=1000, optimizer={"lr": 1e30, "momentum": 0.0, "weight_decay": 0.0})
    with pytest.raises(UserError, match="NaN or infinity after epoch 1"):
        train_single(SingleRun("expert", student(CLEAN), BACKBONE, make_dataset(), wild, seed=0, epsilon=None))


def test_batch_indices_are_shuffled_anew_every_epoch() -> None:
    source = stream("shuffle")
    first, second = (torch.cat(batch_indices(50, 8, source)).tolist() for _ in range(2))
    assert first != second
    assert first != sorted(first)


def test_batches_are_floats_in_range_with_the_right_labels() -> None:
    split = patterned(stream, 20, "batches")
    found = list(batches(split.images, split.labels, 8, OFF, stream("batches")))
    assert sum(len(labels) for _, labels in found) == 20
    by_content = {
        tuple(row): int(label) for row, label in zip(split.pixels().flatten(1).tolist(), split.labels, strict=True)
    }
    for images_BCHW, labels_B in found:
        assert images_BCHW.dtype == torch.float32
        assert [by_content[tuple(row)] for row in images_BCHW.flatten(1).tolist()] == labels_B.tolist()


def numbered(count: int) -> Tensor:
    """Images whose pixels are all different and never 0, so that a shift can be read off."""
    return (torch.arange(1, 1 + 2 * 5 * 7).view(1, 2, 5, 7) + 70 * (torch.arange(count) % 2).view(-1, 1, 1, 1)).byte()


def offsets(image_CHW: Tensor, cropped_CHW: Tensor, padding: int) -> list[tuple[int, int]]:
    """Where in the zero-padded image the crop was taken, all channels together."""
    padded = nn.functional.pad(image_CHW, (padding,) * 4)
    height, width = image_CHW.shape[1:]
    places = [(row, column) for row in range(2 * padding + 1) for column in range(2 * padding + 1)]
    return [
        (row, column)
        for row, column in places
        if torch.equal(padded[:, row : row + height, column : column + width], cropped_CHW)
    ]


def test_crop_is_a_shifted_window_and_all_shifts_occur() -> None:
    images = numbered(200)
    cropped = augment(images, Augmentation(crop=1, flip=False), stream("crop"))
    assert cropped.shape == images.shape
    assert cropped.dtype == images.dtype
    found = [offsets(image, crop, 1) for image, crop in zip(images, cropped, strict=True)]
    assert all(len(places) == 1 for places in found)
    assert {places[0] for places in found} == {(row, column) for row in range(3) for column in range(3)}


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = numbered(200)
    flipped = augment(images, Augmentation(crop=0, flip=True), stream("flip"))
    mirrored = [torch.equal(after, before.flip(2)) for before, after in zip(images, flipped, strict=True)]
    kept = [torch.equal(after, before) for before, after in zip(images, flipped, strict=True)]
    assert [not each for each in kept] == mirrored
    assert sum(mirrored) == pytest.approx(100, abs=30)
    assert flipped.dtype == images.dtype


def test_augmentation_off_changes_nothing() -> None:
    assert torch.equal(augment(numbered(5), OFF, stream("off")), numbered(5))


# ---- the gate's health


def test_load_imbalance_is_zero_when_experts_are_used_alike() -> None:
    assert float(joint.load_imbalance(torch.full((6, 4), 0.25).log())) == 0.0
    # every image has its own favourite, but over the batch the load is even
    certain = torch.full((4, 4), -torch.inf).fill_diagonal_(0.0)
    assert float(joint.load_imbalance(certain)) == pytest.approx(0.0, abs=1e-12)


def test_load_imbalance_of_one_expert_with_everything_is_their_number_less_one() -> None:
    log_gate_BE = torch.full((6, 4), -torch.inf)
    log_gate_BE[:, 2] = 0.0
    assert float(joint.load_imbalance(log_gate_BE)) == pytest.approx(3.0)


def test_load_imbalance_can_be_learned_from() -> None:
    scores_BE = torch.randn(6, 4, generator=stream("scores")).requires_grad_(True)
    (gradient,) = torch.autograd.grad(joint.load_imbalance(scores_BE.log_softmax(1)), scores_BE)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_entropy_closed_forms() -> None:
    assert float(gate_statistics.entropy(torch.full((6, 4), 0.25))) == pytest.approx(math.log(4))
    assert float(gate_statistics.entropy(torch.eye(4))) == 0.0
    assert float(gate_statistics.entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))) == pytest.approx(
        math.log(2) / 2
    )


def test_shift_closed_forms() -> None:
    even, certain = torch.full((4, 4), 0.25), torch.eye(4)
    assert float(gate_statistics.total_variation(even, even)) == 0.0
    assert float(gate_statistics.total_variation(certain, certain.flip(0))) == pytest.approx(1.0)
    assert float(gate_statistics.total_variation(even, certain)) == pytest.approx(0.75)


def health_row(epoch: int = 1, gradient: float = 0.1, left: float = 0.5) -> Row:
    return {"epoch": epoch, "gate_gradient": gradient, "load_left": left, "load_right": 1 - left}


def test_a_healthy_gate_raises_no_alarm() -> None:
    assert joint.gate_alarms([health_row(1), health_row(2, left=0.89)], health_row(2, left=0.89), joint_recipe()) == []


def test_a_collapsed_gate_raises_an_alarm() -> None:
    (alarm,) = joint.gate_alarms([health_row(1), health_row(2, left=0.95)], health_row(2, left=0.95), joint_recipe())
    assert "collapsed" in alarm
    assert "left" in alarm
    assert "95%" in alarm


def test_a_gate_that_recovers_raises_no_alarm() -> None:
    assert joint.gate_alarms([health_row(1, left=0.95), health_row(2)], health_row(2), joint_recipe()) == []


@pytest.mark.parametrize("gradient", [0.1, 0.0])
def test_a_gate_of_one_expert_neither_collapses_nor_has_anything_to_learn(gradient: float) -> None:
    history = [{"epoch": 1, "gate_gradient": gradient, "load_left": 1.0}]
    assert joint.gate_alarms(history, history[-1], joint_recipe(experts=("left",))) == []


def test_a_dead_gate_raises_an_alarm() -> None:
    (alarm,) = joint.gate_alarms(
        [health_row(1), health_row(2, gradient=1e-7), health_row(3)], health_row(3), joint_recipe()
    )
    assert "no gradient in epoch 2" in alarm


def give_scores(mixture: MixtureOfExperts, scores: list[float]) -> None:
    """Make the gate weigh every image by softmax(scores)."""
    assert isinstance(mixture.gate, Gate)
    with torch.no_grad():
        mixture.gate.score.bias.copy_(torch.tensor(scores))


def test_health_of_a_mixture_is_what_its_gate_says() -> None:
    mixture = make_mixture()
    give_scores(mixture, [math.log(3), 0.0])  # weights 3/4 and 1/4 for every image
    task = MixtureTask(mixture, joint_recipe())
    images, labels = patterned(stream, 12, "health").pixels(), torch.arange(12) % 3
    task.loss(images, labels, images).backward()  # type: ignore[no-untyped-call]
    task.on_after_backward()
    row = task.validation_metrics(mixture, images, 1 - images)
    assert row["load_left"] == pytest.approx(0.75)
    assert row["load_right"] == pytest.approx(0.25)
    assert row["gate_shift"] == 0.0
    assert row["gate_entropy"] == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-5)
    assert row["gate_gradient"] > 0
    task.on_epoch_end()
    assert task.gate_norms == []


def test_loss_of_a_mixture_is_its_nll_plus_the_weighted_imbalance() -> None:
    mixture = make_mixture().eval()
    give_scores(mixture, [math.log(3), 0.0])
    images, labels = patterned(stream, 12, "loss").pixels(), torch.arange(12) % 3
    with torch.no_grad():
        nll = -mixture(images)[torch.arange(12), labels].mean()
        found = MixtureTask(mixture, joint_recipe(load_balance=2.0)).loss(images, labels, images)
    # loads 3/4 and 1/4: variance 1/16, squared mean 1/4
    assert float(found) == pytest.approx(float(nll) + 2.0 * 0.25, abs=1e-5)


def test_own_losses_are_the_mean_cross_entropy_of_the_experts() -> None:
    logits_BEK = torch.randn(4, 2, 3, generator=stream("own"))
    labels = torch.tensor([0, 1, 2, 0])
    each = [functional.cross_entropy(logits_BEK[:, expert], labels) for expert in range(2)]
    torch.testing.assert_close(expert_cross_entropy(logits_BEK, labels), (each[0] + each[1]) / 2)


def test_loss_of_a_mixture_counts_its_experts_own_losses() -> None:
    mixture, images, labels = make_mixture().eval(), patterned(stream, 12, "loss").pixels(), torch.arange(12) % 3
    with torch.no_grad():
        own = expert_cross_entropy(mixture.forward_parts(images).logits_BEK, labels)
        without = MixtureTask(mixture, joint_recipe()).loss(images, labels, images)
        found = MixtureTask(mixture, joint_recipe(own_loss=0.5)).loss(images, labels, images)
    assert own > 0
    torch.testing.assert_close(found, without + 0.5 * own)


def test_an_expert_without_weight_learns_from_its_own_loss_only() -> None:
    images, labels = patterned(stream, 12, "loss").pixels(), torch.arange(12) % 3

    def slope(own_loss: float) -> float:
        mixture = make_mixture().eval()
        give_scores(mixture, [60.0, -60.0])
        MixtureTask(mixture, joint_recipe(own_loss=own_loss, load_balance=0.0)).loss(images, labels, images).backward()  # type: ignore[no-untyped-call]
        gradients = [each.grad for each in mixture.experts[1].parameters() if each.grad is not None]
        return max(float(gradient.abs().max()) for gradient in gradients)

    assert slope(0.0) < 1e-9
    assert slope(1.0) > 1e-3


def test_loss_of_a_mixture_under_trades_has_two_terms() -> None:
    """Clean NLL and the divergence of the mixed answers; the attacked images alone would have neither."""
    mixture = make_mixture().eval()
    clean, labels = patterned(stream, 12, "loss").pixels(), torch.arange(12) % 3
    attacked = (clean + 0.2 * torch.randn(clean.shape, generator=stream("moved"))).clamp(0, 1)
    recipe = joint_recipe(adversary=TRADES, load_balance=0.0)
    with torch.no_grad():
        found = MixtureTask(mixture, recipe).loss(attacked, labels, clean)
        nll = functional.nll_loss(mixture(clean), labels)
        apart = kl_divergence(mixture(clean), mixture(attacked)).mean()
    assert apart > 1e-3
    torch.testing.assert_close(found, nll + TRADES.beta * apart)


def test_a_mixture_learns_by_trades() -> None:
    trained, _ = run_mixture(adversary=TRADES, epochs=4)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


# ---- the alarm for overfitting to one step


def scripted(monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> None:
    """Let validation say what the test needs; training stays real."""
    left = iter(rows)

    def validate(model: nn.Module, job: TrainingJob) -> tuple[Row, Tensor, Tensor]:
        del model
        pixels = job.dataset["validation"].pixels()
        return next(left), pixels, pixels

    monkeypatch.setattr(validation, "validate", validate)


def score(clean: float, fgsm: float = 0.5, pgd: float = 0.5) -> Row:
    return {"clean": clean, "fgsm": fgsm, "pgd": pgd}


def test_fgsm_overfitting_raises_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [score(0.9, fgsm=0.6, pgd=0.1)])
    (alarm,) = train_plain(FGSM, epochs=1).alarms
    assert alarm.startswith("tiny: FGSM accuracy 0.600 but PGD accuracy 0.100")


@pytest.mark.parametrize(("adversary", "pgd"), [(FGSM, 0.45), (CLEAN, 0.1)], ids=["small gap", "benign"])
def test_no_overfitting_raises_no_alarm(monkeypatch: pytest.MonkeyPatch, adversary: Adversary, pgd: float) -> None:
    scripted(monkeypatch, [score(0.9, fgsm=0.6, pgd=pgd)])
    assert train_plain(adversary, epochs=1).alarms == []


def test_overfitting_is_judged_on_the_epoch_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [score(0.9, fgsm=0.5), score(0.5, fgsm=0.9, pgd=0.0)]
    scripted(monkeypatch, rows)
    assert train_plain(FGSM, selection="best").alarms == []
    scripted(monkeypatch, rows)
    assert len(train_plain(FGSM, selection="last").alarms) == 1


# ---- whole runs


@pytest.mark.parametrize("adversary", [CLEAN, FGSM, PGD, MIXED], ids=["clean", "fgsm", "pgd", "mixed"])
def test_fit_twice_is_the_same_to_the_last_bit(adversary: Adversary) -> None:
    changes: dict[str, Any] = {"augmentation": Augmentation(crop=1, flip=True), "clip": 1.0}
    first, second = train_plain(adversary, **changes), train_plain(adversary, **changes)
    assert same(first.model, second.model)
    assert first.history == second.history
    assert not same(first.model, make_model())


def student(adversary: Adversary, seed: int = 0) -> NetworkSpec:
    return NetworkSpec(adversary=adversary, seed=seed)


def run_single(adversary: Adversary, seed: int = 0, own: int = 0, **changes: Any) -> TrainingResult:
    radius = EPSILON if student(adversary).uses_threat_epsilon else None
    recipe = single_recipe(**changes)
    return train_single(
        SingleRun("expert", student(adversary, own), BACKBONE, make_dataset(), recipe, seed=seed, epsilon=radius)
    )


@pytest.mark.parametrize("adversary", [FGSM, PGD], ids=["fgsm", "pgd"])
def test_train_single_is_deterministic_in_its_seeds(adversary: Adversary) -> None:
    first = run_single(adversary, epochs=1)
    assert same(first.model, run_single(adversary, epochs=1).model)
    assert not same(first.model, run_single(adversary, epochs=1, seed=1).model)
    assert not same(first.model, run_single(adversary, epochs=1, own=1).model)


def test_training_does_not_touch_the_global_random_state() -> None:
    """Nor does it depend on it."""
    torch.manual_seed(1)
    first = run_single(FGSM, epochs=1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(2)
    assert same(run_single(FGSM, epochs=1).model, first.model)


def run_mixture(seed: int = 0, **changes: Any) -> tuple[TrainingResult, MixtureArchitecture]:
    experts = [make_model(1), make_model(2)]
    recipe = joint_recipe(**changes)
    return train_mixture(JointRun(experts, BACKBONE, make_dataset(), recipe, seed=seed, epsilon=EPSILON))


def test_train_mixture_twice_is_the_same_to_the_last_bit() -> None:
    (first, architecture), (second, _) = run_mixture(batch_size=16), run_mixture(batch_size=16)
    assert same(first.model, second.model)
    assert first.history == second.history
    assert architecture.experts == ("left", "right")
    assert not same(first.model, run_mixture(seed=1, epochs=1)[0].model)


def test_checkpointing_changes_no_number() -> None:
    (plain, _), (lean, _) = (run_mixture(checkpointing=on) for on in (False, True))
    assert same(plain.model, lean.model)
    assert (plain.history, plain.cost) == (lean.history, lean.cost)


def test_train_mixture_moves_gate_and_copies_of_the_experts() -> None:
    experts = [make_model(1), make_model(2)]
    trained, _ = train_mixture(JointRun(experts, BACKBONE, make_dataset(), joint_recipe(), seed=0, epsilon=EPSILON))
    assert isinstance(trained.model, MixtureOfExperts)
    assert same(experts[0], make_model(1))
    assert same(experts[1], make_model(2))
    for before, after in zip(experts, trained.model.experts, strict=True):
        assert not same(before, after)
    assert isinstance(trained.model.gate, Gate)
    assert trained.model.gate.score.weight.abs().max() > 0


def test_history_of_a_mixture_has_its_columns() -> None:
    trained, _ = run_mixture(epochs=1)
    columns = ["epoch", "loss", "clean", "fgsm", "pgd", "gate_gradient", "gate_entropy", "gate_shift"]
    assert list(trained.history[0]) == [*columns, "load_left", "load_right"]
    assert trained.history[0]["load_left"] + trained.history[0]["load_right"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("adversary", [CLEAN, PGD], ids=["clean", "pgd"])
def test_training_lowers_the_loss_and_learns_the_patterns(adversary: Adversary) -> None:
    trained = train_plain(adversary, epochs=6)
    losses = [row["loss"] for row in trained.history]
    assert losses[-1] < 0.7 * losses[0]
    assert [row["epoch"] for row in trained.history] == [1, 2, 3, 4, 5, 6]
    assert trained.kept == trained.history[-1]
    assert trained.kept["clean"] > 0.6  # one in three by chance
    assert trained.kept["clean"] >= trained.kept["pgd"]


def test_training_a_mixture_lowers_the_loss() -> None:
    trained, _ = run_mixture(epochs=4, adversary=CLEAN)
    assert trained.history[-1]["loss"] < 0.7 * trained.history[0]["loss"]


def test_fit_returns_the_model_in_eval_mode_ready_to_learn_again() -> None:
    model = train_plain(PGD, epochs=1).model
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_validation_accuracy_is_that_of_the_model_that_is_kept() -> None:
    trained = train_plain(CLEAN, epochs=2)
    split = make_dataset()["validation"]
    right = inference.predict(trained.model, split.pixels(), 18).argmax(1) == split.labels
    assert trained.kept["clean"] == pytest.approx(float(right.float().mean()), abs=1e-6)


@pytest.mark.parametrize("adversary", [CLEAN, PGD], ids=["clean", "pgd"])
def test_a_diverging_run_ends_in_one_sentence(adversary: Adversary) -> None:
    with pytest.raises(
        UserError, match=r"^tiny: the loss became NaN or infinite in epoch 1, batch \d+; lower"
    ) as error:
        train_plain(adversary, optimizer=Optimizer(lr=1e30, momentum=0.9, weight_decay=0.0), schedule=CONSTANT)
    assert "\n" not in str(error.value)


def test_a_diverging_mixture_ends_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^mixture: the loss became NaN or infinite in epoch 1"):
        run_mixture(optimizer=Optimizer(lr=1e30, momentum=0.9, weight_decay=0.0), schedule=CONSTANT)


def test_clipping_bounds_a_step() -> None:
    plain = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    changes: dict[str, Any] = {"optimizer": Optimizer(**plain), "schedule": CONSTANT, "batch_size": 48, "epochs": 1}

    def step(clip: float) -> float:
        moved = train_plain(CLEAN, clip=clip, **changes).model.parameters()
        pairs = zip(moved, make_model().parameters(), strict=True)
        return math.sqrt(sum(float((after - before).detach().square().sum()) for after, before in pairs))

    assert step(0.01) == pytest.approx(0.01, rel=0.01)  # one step of rate 1 is as long as the gradient
    assert step(0.0) > 0.1


# ---- averaged weights, and which epoch is kept


class Watched(PlainTask):
    """Keeps the weights that each step starts from."""

    def __init__(self, model: nn.Module, recipe: ValidatedTrainingConfig) -> None:
        super().__init__(model, recipe)
        self.seen: list[list[Tensor]] = []

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        self.seen.append([parameter.detach().clone() for parameter in self.model.parameters()])
        return super().loss(images_BCHW, labels_B, clean_BCHW)


def test_ema_keeps_the_averaged_weights() -> None:
    recipe = make_recipe()
    task = Watched(make_model(), recipe)
    plain = fit(task, make_job(recipe, FGSM))
    after_each_step = [*task.seen[1:], [parameter.detach() for parameter in plain.model.parameters()]]
    average = after_each_step[0]
    for weights in after_each_step[1:]:
        average = [0.8 * old + 0.2 * new for old, new in zip(average, weights, strict=True)]

    averaged = train_plain(FGSM, ema=0.8)  # averaging looks on: the run itself is the same
    assert averaged.history[0]["loss"] == plain.history[0]["loss"]
    assert not same(averaged.model, plain.model)
    for found, expected in zip(averaged.model.parameters(), average, strict=True):
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)


def test_ema_validates_the_averaged_weights() -> None:
    trained = train_plain(CLEAN, ema=0.9)
    split = make_dataset()["validation"]
    right = inference.predict(trained.model, split.pixels(), 18).argmax(1) == split.labels
    assert trained.kept["clean"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_ema_of_a_mixture_watches_the_averaged_gate() -> None:
    trained, _ = run_mixture(ema=0.9, epochs=1)
    assert isinstance(trained.model, MixtureOfExperts)
    weights = gate_statistics.gate_weights(trained.model, make_dataset()["validation"].pixels())
    assert trained.kept["load_left"] == pytest.approx(float(weights[:, 0].mean()), abs=1e-5)


ROWS = [score(0.5, pgd=0.3), score(0.9, pgd=0.2), score(0.9, pgd=0.1), score(0.4, pgd=0.4)]


@pytest.mark.parametrize(
    ("selection", "select_by", "epoch"),
    [("best", "clean", 2), ("best", "pgd", 4), ("last", "clean", 4)],  # of equals the first
)
def test_selection_keeps_the_right_epoch(
    monkeypatch: pytest.MonkeyPatch, selection: str, select_by: str, epoch: int
) -> None:
    scripted(monkeypatch, ROWS)
    trained = train_plain(CLEAN, select_by, epochs=4, selection=selection, schedule=CONSTANT)
    scripted(monkeypatch, ROWS)
    shorter = train_plain(CLEAN, epochs=epoch, schedule=CONSTANT)
    assert len(trained.history) == 4
    assert trained.kept["epoch"] == epoch
    assert same(trained.model, shorter.model)


def test_selection_by_robust_accuracy_for_those_who_meet_the_threat_model(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"epochs": 4, "sync_batchnorm": False, "selection": "best", "batch_size": 24}
    scripted(monkeypatch, ROWS)
    assert run_single(PGD, **changes).kept["epoch"] == 4
    scripted(monkeypatch, ROWS)
    assert run_single(FGSM, **changes).kept["epoch"] == 2
    scripted(monkeypatch, ROWS)
    assert run_mixture(adversary=CLEAN, **changes)[0].kept["epoch"] == 4


# ---- students


@pytest.mark.parametrize(("adversary", "meets"), [(CLEAN, False), (FGSM, False), (PGD, True)])
def test_only_attacks_at_the_top_level_epsilon_meet_the_threat_model(adversary: Adversary, meets: bool) -> None:
    assert NetworkSpec(adversary=adversary, seed=0).uses_threat_epsilon == meets


def test_validation_radius_is_the_threat_models_or_the_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []

    def validate(model: nn.Module, job: TrainingJob) -> tuple[Row, Tensor, Tensor]:
        del model
        radii.append(job.epsilon)
        pixels = job.dataset["validation"].pixels()
        return score(0.5), pixels, pixels

    monkeypatch.setattr(validation, "validate", validate)
    recipe = single_recipe(epochs=1)
    for adversary, epsilon in ((FGSM, None), (PGD, 0.25)):
        train_single(SingleRun("expert", student(adversary), BACKBONE, make_dataset(), recipe, seed=0, epsilon=epsilon))
    assert radii == [EPSILON, 0.25]


def test_baselines_are_trained_by_the_experts_recipe_for_as_long_in_total() -> None:
    recipe = single_recipe(epochs=5)
    assert baseline_config(recipe, 3) == single_recipe(epochs=8)
    assert recipe.epochs == 5

"""Batches in pieces: the same gradients, draws and steps as of whole batches, in less memory.

Shapes: B batch, C channel, H/W pixels, E experts, K classes.
"""

from typing import Any

import pytest
import torch
from test_resume_training import BACKBONE, MIXED, RECIPE, make_data, make_model
from tiny import FACTS
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.random_streams import BatchStream, MicroBatchStream
from advmoe.models import classifiers
from advmoe.models.classifiers import GateSettings, MixtureArchitecture
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import generator
from advmoe.training.baselines.tasks import AlternatingTask, LastLayersTask
from advmoe.training.batch_attacks import Adversary, PgdBatches, TradesBatches
from advmoe.training.job import TrainingJob, TrainingTask
from advmoe.training.joint import AlarmThresholds, JointConfig, MixtureTask, load_imbalance
from advmoe.training.microbatches import split_batch
from advmoe.training.single import PlainTask, SingleConfig, TradesTask
from advmoe.training.trainer import Trainer

PGD = PgdBatches(kind="pgd", steps=(2, 3), step_size=0.5)
TRADES = TradesBatches(kind="trades", steps=(2,), step_size=0.5, beta=2.0)
STEP: dict[str, Any] = {"batch_size": 12, "clip": 0.0, "ema": 0.0}


class Exact(nn.Module):
    """A small network in double precision; a BatchNorm on demand."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(4 * 36, 3)).double()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layers(images_BCHW.double())
        return logits


def exact(*, norm: bool = False) -> Exact:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Exact(norm=norm)


def recipe_of(micro_batch: int | None) -> SingleConfig:
    return SingleConfig(validation_epsilon=0.05, **RECIPE | STEP | {"micro_batch": micro_batch})


def joint_recipe(micro_batch: int | None, load_balance: float = 0.5) -> JointConfig:
    own = {"micro_batch": micro_batch, "experts": ("left", "right"), "gate": GateSettings(width=2, temperature=1.0)}
    more = {
        "mixing": "probabilities",
        "adversary": MIXED,
        "gate_lr": 0.1,
        "own_loss": 0.0,
        "recipe": "dwf",
        "load_balance": load_balance,
        "checkpointing": False,
    }
    return JointConfig(**RECIPE | STEP | own | more, alarms=AlarmThresholds(load=0.99, gradient=1e-9))


def make_mixture() -> MixtureOfExperts:
    about = MixtureArchitecture(
        kind="mixture",
        backbone=BACKBONE,
        experts=("left", "right"),
        gate=GateSettings(width=2, temperature=1.0),
        mixing="probabilities",
    )
    return classifiers.build_mixture(about, FACTS, [make_model(1), make_model(2)], 0)


def after_steps(task: TrainingTask, recipe: Any, adversary: Adversary = PGD, steps: int = 1) -> Trainer:
    run = Trainer(task, TrainingJob("tiny", 0, make_data(), recipe, adversary, 0.05, "clean"))
    for step in range(steps):
        rows = slice(12 * step, 12 * step + 12)
        run.state.losses.append(run.step(run.images[rows].float() / 255, run.labels[rows]))
    return run


def gradients(run: Trainer) -> list[Tensor]:
    return [parameter.grad for parameter in run.task.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [
        (12, None, [12]),
        (12, 12, [12]),
        (12, 5, [4, 4, 4]),
        (13, 5, [5, 4, 4]),
        (5, 2, [3, 2]),  # rather above the limit than an image alone, from which BatchNorm cannot learn
        (3, 2, [3]),
        (1, 2, [1]),
    ],
)
def test_pieces_are_few_and_alike_and_lose_no_image(count: int, most: int | None, sizes: list[int]) -> None:
    pieces = split_batch(count, most)
    assert [len(piece) for piece in pieces] == sizes
    assert torch.cat(pieces).tolist() == list(range(count))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_an_image_draws_the_same_in_every_piece(kind: str) -> None:
    images = torch.zeros(10, 2, 3, 3)
    whole = getattr(BatchStream(generator("pieces")), kind)(images)
    for rows in (torch.arange(10), torch.tensor([3]), torch.tensor([7, 2, 9])):
        draws = MicroBatchStream(generator("pieces"), 10, rows)
        assert torch.equal(getattr(draws, kind)(images[rows]), whole[rows])
    some = MicroBatchStream(generator("pieces"), 10, torch.tensor([7, 2, 9])).pick(torch.tensor([2, 0]))
    assert torch.equal(getattr(some, kind)(images[:2]), whole[[9, 7]])


@pytest.mark.parametrize("most", [5, 4, 2])
@pytest.mark.parametrize(("adversary", "awp"), [(PGD, 0.0), (TRADES, 0.0), (PGD, 0.1)], ids=["pgd", "trades", "awp"])
def test_gradients_are_those_of_the_whole_batch(most: int, adversary: Adversary, awp: float) -> None:
    def run(micro_batch: int | None) -> Trainer:
        model, recipe = exact(), recipe_of(micro_batch).model_copy(update={"awp": awp})
        task = TradesTask(model, recipe, 2.0) if adversary is TRADES else PlainTask(model, recipe)
        return after_steps(task, recipe, adversary, steps=2)

    whole, pieces = run(None), run(most)
    for found, expected in zip(gradients(pieces), gradients(whole), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.stack(pieces.state.losses), torch.stack(whole.state.losses), atol=1e-9, rtol=0)
    assert (pieces.state.passes, pieces.state.images_learned) == (whole.state.passes, whole.state.images_learned)
    assert whole.state.passes.backward > 0


def test_no_more_images_at_once_than_asked_for() -> None:
    seen: list[tuple[bool, int]] = []
    model = exact(norm=True)
    model.register_forward_pre_hook(lambda _, inputs: seen.append((model.training, len(inputs[0]))))
    after_steps(PlainTask(model, recipe_of(5)), recipe_of(5))
    assert set(seen) == {(False, 4), (True, 4)}  # twelve in three pieces, crafted and learned from
    assert seen.count((True, 4)) == 3


def test_running_statistics_move_once_a_batch_by_the_mean_over_its_pieces() -> None:
    model, start = exact(norm=True), exact(norm=True)
    images = make_data()["train"].pixels()[:12].double()
    after_steps(PlainTask(model, recipe_of(5)), recipe_of(5), adversary=MIXED.of[0])
    conv, norm = start.layers[0], model.layers[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        features = torch.tensor_split(conv(images), 3)
    means = torch.stack([part.mean(dim=(0, 2, 3)) for part in features]).mean(dim=0)
    variances = torch.stack([part.transpose(0, 1).flatten(1).var(dim=1) for part in features]).mean(dim=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances)


def test_statistics_that_are_frozen_stay_to_the_last_bit() -> None:
    mixture = make_mixture()
    with torch.no_grad():
        mixture.train()(make_data()["train"].pixels())
    before = {name: tensor.clone() for name, tensor in mixture.experts.named_buffers()}
    after_steps(LastLayersTask(mixture, joint_recipe(5)), joint_recipe(5), steps=2)
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.experts.named_buffers())


def test_a_turn_is_a_batch_however_many_pieces_it_has() -> None:
    task = AlternatingTask(make_mixture(), joint_recipe(2))
    after_steps(task, joint_recipe(2), steps=2)
    assert task.turn == 2


def test_each_piece_balances_its_own_load() -> None:
    mixture, recipe = make_mixture(), joint_recipe(5, load_balance=3.0)
    with torch.no_grad():
        nn.init.normal_(mixture.gate.get_parameter("score.weight"), generator=generator("gate"))
    data = make_data()["train"].first(12)
    task = MixtureTask(mixture.eval(), recipe)
    task.on_step_start = lambda: None  # type: ignore[method-assign]  # stays in eval mode: images do not see each other
    job = TrainingJob("tiny", 0, make_data(), recipe, MIXED.of[0], 0.05, "clean")
    with torch.no_grad():
        parts = [mixture.forward_parts(images) for images in torch.tensor_split(data.pixels(), 3)]
        nll = functional.nll_loss(torch.cat([part.log_probs_BK for part in parts]), data.labels)
        imbalance = torch.stack([load_imbalance(part.log_gate_BE) for part in parts]).mean()
    found = Trainer(task, job).step(data.pixels(), data.labels)
    torch.testing.assert_close(found, nll + 3.0 * imbalance)
    assert imbalance > 0

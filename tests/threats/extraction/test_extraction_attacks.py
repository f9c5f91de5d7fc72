"""Query pools and extraction attacks: sources and order of the queries, and that the budget is never exceeded.

Shapes: N images, C channel, H/W pixels, K classes, P pixels in a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import EXTRACT
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.core.errors import UserError
from advmoe.core.settings import validate
from advmoe.data.dataset import Dataset, DatasetInfo, Split, image_digests
from advmoe.models.classifiers import BackboneSettings
from advmoe.runtime.machine import generator
from advmoe.threats.extraction import dfme as data_free
from advmoe.threats.extraction import query_pools, surrogate, transfer_set, victims
from advmoe.threats.extraction.best import Best, most_uncertain
from advmoe.threats.extraction.config import Common
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.copycat import Copycat
from advmoe.threats.extraction.dfme import Dfme, Generator
from advmoe.threats.extraction.jbda import augmented
from advmoe.threats.extraction.knockoff_adaptive import Bandit, rewards
from advmoe.threats.extraction.oracle import Oracle
from advmoe.threats.extraction.query_pools import (
    AnyPool,
    Candidates,
    InDistribution,
    OtherDataset,
    Photographs,
    UniformNoise,
)
from advmoe.threats.extraction.registry import ATTACKS, AnyExtraction, Extraction, run_extraction
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.training.job import TrainingResult
from advmoe.training.trainer import Trainer

CLASSES, POOL = 3, 40
GREY = DatasetInfo(channels=1, height=8, width=8, class_names=("a", "b", "c"), mean=(0.5,), std=(0.3,))
COLOUR = DatasetInfo(channels=3, height=32, width=32, class_names=("a", "b", "c"), mean=(0.5,) * 3, std=(0.3,) * 3)
COMMON = validate(EXTRACT, Common, "test")
NOISE = {"kind": "noise", "images": 50}
KINDS: dict[str, dict[str, Any]] = {
    "knockoff": {"kind": "knockoff", "pool": NOISE},
    "knockoff-adaptive": {"kind": "knockoff-adaptive", "pool": {"kind": "in-distribution"}, "rounds": 3},
    "copycat": {"kind": "copycat", "pool": NOISE, "own": 0.25},
    "jbda": {"kind": "jbda", "seeds": 6, "doublings": 2, "step": 0.1},
    "best": {"kind": "best", "rounds": 3, "epsilon": "16/255", "steps": 2, "step_size": 0.5},
    "dfme": {
        "kind": "dfme",
        "batch_size": 3,
        "latent": 4,
        "width": 2,
        "directions": 1,
        "step": 20,
        "learning": 2,
    },
}
BUDGET = 20
TOO_MUCH = {"knockoff": 51, "knockoff-adaptive": 41, "copycat": 67, "jbda": 25, "best": 121}
TOO_LITTLE = {"knockoff-adaptive": 5, "best": 5, "dfme": 11}


def make_split(images: Tensor, classes: int = CLASSES, start: int = 0) -> Split:
    return Split(images, torch.arange(len(images)) % classes, torch.arange(start, start + len(images)))


def make_data(facts: DatasetInfo = GREY, pool: int = POOL) -> Dataset:
    """Random images, all of them different."""
    counts = {"train": 30, "pool": pool, "validation": 10, "test": 10}
    shape = (sum(counts.values()), facts.channels, facts.height, facts.width)
    images = torch.randint(0, 256, shape, generator=generator("data"), dtype=torch.uint8)
    splits, start = {}, 0
    for name, count in counts.items():
        splits[name] = make_split(images[start : start + count], start=start)
        start += count
    return Dataset(splits, facts, "sha256")  # type: ignore[arg-type]


def changed(data: Dataset, **splits: Split) -> Dataset:
    return Dataset({**data.splits, **splits}, data.facts, data.sha256)  # type: ignore[dict-item]


class Linear(nn.Module):
    """logits = W x."""

    def __init__(self, weight_KP: Tensor) -> None:
        super().__init__()
        self.weight_KP = nn.Parameter(weight_KP)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1) @ self.weight_KP.T


def linear(pixels: int = 64, scale: float = 1.0, seed: str = "weights") -> Linear:
    return Linear(scale * torch.randn(CLASSES, pixels, generator=generator(seed)))


def train_surrogate(
    known: TransferSet,
    data: Dataset,
    *,
    name: str = "same",
    kind: Literal["resnet18", "cnn"] = "cnn",
    seed: int = 0,
    **changes: Any,
) -> TrainingResult:
    """Trains a small surrogate on a transfer set."""
    common = COMMON.model_copy(update=changes)
    return surrogate.train(name, BackboneSettings(kind=kind, width=2), known, data, common, seed=seed, epsilon=0.1)


@dataclass
class AttackSetup:
    """The context of an attack on a linear victim, with its query batches and the transfer sets of its surrogates."""

    context: AttackContext
    oracle: Oracle
    batches: list[Tensor] = field(default_factory=list)
    training_sets: list[TransferSet] = field(default_factory=list)


def attack_setup(
    budget: int, *, mode: str = "soft", data: Dataset | None = None, learn: bool = True, seed: int = 0
) -> AttackSetup:
    """`learn`: surrogates are small trained networks; otherwise always the same linear one."""
    data = data or make_data()
    victim, found = (
        victims._network_victim("linear", "id", linear(seed="victim"), CLASSES),
        AttackSetup.__new__(AttackSetup),
    )
    found.batches, found.training_sets = [], []

    def ask(images_NCHW: Tensor) -> Tensor:
        found.batches.append(images_NCHW.clone())
        return victim.query(images_NCHW)

    def train(known: TransferSet) -> nn.Module:
        found.training_sets.append(known)
        if not learn:
            return linear(seed="surrogate")
        return train_surrogate(known, data, seed=seed).model

    found.oracle = Oracle(ask, mode, budget)
    found.context = AttackContext(
        oracle=found.oracle,
        load_pool=lambda pool: query_pools.load_pool(pool, data, generator(seed, "pool", pool.kind)),
        train_surrogate=train,
        build_surrogate=lambda: surrogate.build(BackboneSettings(kind="cnn", width=2), data, seed, "fresh"),
        stream=generator(seed, "attack"),
        facts=data.facts,
    )
    return found


def settings(kind: str, **changes: Any) -> AnyExtraction:
    made: AnyExtraction = validate(KINDS[kind] | changes, Extraction, "test")  # type: ignore[arg-type]
    return made


def same(first: TransferSet, second: TransferSet) -> bool:
    pairs = ((first.images, second.images), (first.answers, second.answers), (first.queries, second.queries))
    return all(torch.equal(one, other) for one, other in pairs)


# ---- pools


@pytest.mark.parametrize("facts", [GREY, COLOUR], ids=["grey-8", "colour-32"])
def test_photographs_are_crops_in_the_victims_size_drawn_by_the_stream_alone(facts: DatasetInfo) -> None:
    pool, data = Photographs(kind="photographs", images=30), make_data(facts)
    first, again, other = (query_pools.load_pool(pool, data, generator(seed)) for seed in (1, 1, 2))
    assert first.images.shape == (30, facts.channels, facts.height, facts.width)
    assert first.images.dtype == torch.uint8
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.groups, again.groups)
    assert not torch.equal(first.images, other.images)
    assert first.groups.min() >= 0
    assert first.groups.max() < 2 * len(query_pools.SCALES)
    # photographs, not noise: neighbouring pixels are alike
    pixels = first.images.float()
    assert (pixels[..., 1:] - pixels[..., :-1]).abs().mean() < 0.6 * (
        pixels[..., 1:] - pixels.flip(0)[..., :-1]
    ).abs().mean()


def test_crops_larger_than_the_photographs_are_refused() -> None:
    huge = GREY.model_copy(update={"height": 500})
    with pytest.raises(UserError, match=r"too small for crops of \d+ x"):
        query_pools._photographs(20, huge, generator("crops"))


def test_uniform_noise_takes_every_level() -> None:
    noise = query_pools.uniform_noise(400, GREY, generator("noise"))
    counts = torch.bincount(noise.flatten().long(), minlength=256)
    assert counts.min() > 0
    assert noise.shape == (400, 1, 8, 8)
    assert abs(float(noise.float().mean()) - 127.5) < 2


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_pool_that_overlaps_with_the_victims_images_is_refused(name: str) -> None:
    data = make_data()
    theirs = data.splits[name].images  # type: ignore[index]
    mine = torch.cat([data["pool"].images, theirs[:3], theirs[:1]])
    with pytest.raises(UserError, match=f"pool and the victim's {name} split share 3 images"):
        query_pools.check_disjoint(mine, data)
    query_pools.check_disjoint(data["pool"].images, data)


def test_a_foreign_set_that_is_the_victims_own_is_refused(tmp_path: Path) -> None:
    data = make_data()
    file = save_npz(tmp_path / "theirs.npz", torch.cat([data["train"].images[:5], make_data(pool=60)["pool"].images]))
    with pytest.raises(UserError, match="the victim's train split share 5 images"):
        query_pools.load_pool(other_dataset(file), data, generator(0))


def save_npz(path: Path, images: Tensor) -> Path:
    labels = np.arange(len(images)) % 2
    np.savez(path, images=images.permute(0, 2, 3, 1).squeeze(3).numpy(), labels=labels)
    return path


def other_dataset(file: Path) -> OtherDataset:
    source = {"kind": "npz", "train": file, "test": None, "per_class": None, "test_per_class": None}
    return validate({"kind": "dataset", "source": source}, OtherDataset, "test")


def test_the_training_images_of_another_source_are_a_pool_grouped_by_class(tmp_path: Path) -> None:
    theirs = torch.randint(0, 256, (12, 1, 8, 8), generator=generator("other"), dtype=torch.uint8)
    found = query_pools.load_pool(other_dataset(save_npz(tmp_path / "other.npz", theirs)), make_data(), generator(0))
    assert sorted(image_digests(found.images)) == sorted(image_digests(theirs))
    label = dict(zip(image_digests(theirs), (np.arange(12) % 2).tolist(), strict=True))
    assert found.groups.tolist() == [label[digest] for digest in image_digests(found.images)]
    assert image_digests(found.images) != image_digests(theirs)  # shuffled


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 8)], ids=["colour", "one pixel"])
def test_a_foreign_set_of_another_size_is_refused(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    file = save_npz(tmp_path / "other.npz", torch.zeros(6, *shape, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"pool \(npz\): images are .* but the victim takes \(1, 8, 8\)"):
        query_pools.load_pool(other_dataset(file), make_data(), generator(0))


def test_the_in_distribution_pool_excludes_images_of_the_victims_splits() -> None:
    data = make_data()
    pool = data["pool"]
    images = pool.images.clone()
    images[0], images[7], images[9] = (data[name].images[2] for name in ("train", "validation", "test"))
    data = changed(data, pool=Split(images, pool.labels, pool.index))
    own = query_pools.in_distribution(data)
    kept = [row for row in range(POOL) if row not in {0, 7, 9}]
    assert torch.equal(own.images, images[kept])
    assert torch.equal(own.labels, pool.labels[kept])
    assert torch.equal(own.index, pool.index[kept])
    assert len(query_pools.load_pool(InDistribution(kind="in-distribution"), data, generator(0))) == POOL - 3


def test_an_attacker_without_images_is_refused() -> None:
    data = make_data(pool=0)
    with pytest.raises(UserError, match="the attacker's pool holds no images"):
        query_pools.in_distribution(data)
    only_theirs = changed(make_data(), pool=make_split(make_data()["train"].images, start=500))
    with pytest.raises(UserError, match="the attacker's pool holds no images"):
        query_pools.in_distribution(only_theirs)


def test_a_pool_that_shares_rows_with_the_training_split_is_an_assertion_error() -> None:
    data = make_data()
    with pytest.raises(AssertionError, match="disjoint"):
        query_pools.in_distribution(
            changed(data, pool=Split(data["pool"].images, data["pool"].labels, torch.arange(POOL)))
        )


@pytest.mark.parametrize(
    "pool",
    [InDistribution(kind="in-distribution"), UniformNoise(kind="noise", images=30)],
    ids=lambda pool: str(pool.kind),
)
def test_pools_are_shuffled_by_the_stream_alone(pool: AnyPool) -> None:
    first, again, other = (query_pools.load_pool(pool, make_data(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


# ---- every attack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["soft", "top1"])
def test_every_query_is_in_the_transfer_set_and_in_the_log(kind: str, mode: str) -> None:
    made = attack_setup(BUDGET, mode=mode)
    found = run_extraction(settings(kind), made.context)
    oracle, asked = made.oracle, torch.cat(made.batches)
    assert 0 < oracle.used <= BUDGET
    assert oracle.used == len(asked) == len(found.images) == len(found.answers)
    assert torch.equal(found.images, asked)
    assert oracle.query_log == image_digests(found.images)
    assert found.queries.tolist() == list(range(1, oracle.used + 1))
    assert found.images.dtype == torch.uint8
    with torch.no_grad():
        told = linear(seed="victim")(asked.float() / 255)
    if mode == "soft":
        assert torch.allclose(found.answers, told.softmax(1), atol=1e-6)
    else:
        assert torch.equal(found.answers.argmax(1), told.argmax(1))
        assert torch.equal(found.answers.sum(1), torch.ones(len(asked)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_spends_what_it_can(kind: str) -> None:
    made = attack_setup(BUDGET)
    run_extraction(settings(kind), made.context)
    assert made.oracle.used == (BUDGET if kind != "dfme" else 12)  # a round is 3 x (1 + 1 + 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_is_repeated_bit_for_bit_by_its_seed(kind: str) -> None:
    first, again, other = (
        run_extraction(settings(kind), attack_setup(BUDGET, seed=seed).context) for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(("kind", "budget"), [*TOO_MUCH.items(), *TOO_LITTLE.items()], ids=str)
def test_a_budget_that_cannot_be_spent_is_refused_before_anything_is_asked(kind: str, budget: int) -> None:
    made = attack_setup(budget, learn=False)
    with pytest.raises(UserError, match=f"a budget of {budget} queries ") as refused:
        run_extraction(settings(kind), made.context)
    assert (made.oracle.used, made.batches, made.training_sets) == (0, [], [])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "budget"), TOO_MUCH.items(), ids=[*TOO_MUCH])
def test_the_largest_budget_that_can_be_spent_is_spent(kind: str, budget: int) -> None:
    made = attack_setup(budget - 1, learn=False)
    assert len(run_extraction(settings(kind), made.context).images) == made.oracle.used == budget - 1


def test_seeds_that_the_pool_does_not_have_are_refused_before_anything_is_asked() -> None:
    made = attack_setup(60, learn=False)
    with pytest.raises(UserError, match="50 seeds are required, but the attacker's pool holds 40"):
        run_extraction(settings("jbda", seeds=50), made.context)
    assert made.oracle.used == 0


def test_every_registered_attack_is_tested_here() -> None:
    assert {type(settings(kind)) for kind in KINDS} == set(ATTACKS)
    assert len(KINDS) == len(ATTACKS)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("kind", ["knockoff-adaptive", "best"])
def test_rounds_of_less_than_two_queries_are_refused_and_rounds_of_two_are_asked(kind: str, rounds: int) -> None:
    """No network learns from one image."""
    short, enough = attack_setup(2 * rounds - 1), attack_setup(2 * rounds)
    words = f"a budget of {2 * rounds - 1} queries is less than two in each of {rounds} rounds"
    with pytest.raises(UserError, match=words):
        run_extraction(settings(kind, rounds=rounds), short.context)
    assert (short.oracle.used, short.training_sets) == (0, [])
    run_extraction(settings(kind, rounds=rounds), enough.context)
    assert [len(batch) for batch in enough.batches] == [2] * rounds
    assert [len(training_set.images) for training_set in enough.training_sets] == list(range(2, 2 * rounds, 2))


@pytest.mark.parametrize("budget", range(6, 14))
@pytest.mark.parametrize("kind", ["knockoff-adaptive", "best"])
def test_no_surrogate_in_between_learns_from_a_single_answer(kind: str, budget: int) -> None:
    made = attack_setup(budget)
    assert len(run_extraction(settings(kind), made.context).images) == budget
    assert min(len(training_set.images) for training_set in made.training_sets) >= 2


@pytest.mark.parametrize(
    ("kind", "changes", "budget"),
    [("jbda", {"seeds": 2}, 3), ("knockoff-adaptive", {"rounds": 2}, 4), ("best", {"rounds": 3}, 6)],
    ids=["jbda", "knockoff-adaptive", "best"],
)
@pytest.mark.parametrize("backbone", ["resnet18", "cnn"])
def test_the_smallest_budgets_and_seeds_that_are_allowed_are_enough(
    kind: str, changes: dict[str, int], budget: int, backbone: Any
) -> None:
    made, data = attack_setup(budget), make_data()

    def learn(known: TransferSet) -> nn.Module:
        return train_surrogate(known, data, kind=backbone).model

    context = AttackContext(
        made.oracle, made.context.load_pool, learn, made.context.build_surrogate, made.context.stream, GREY
    )
    assert len(run_extraction(settings(kind, **changes), context).images) == made.oracle.used == budget


@pytest.mark.parametrize("seeds", [1, 0, 2.0], ids=str)
def test_jbda_refuses_fewer_than_two_or_fractional_seeds(seeds: float) -> None:
    with pytest.raises(UserError, match="seeds: "):
        settings("jbda", seeds=seeds)


# ---- surrogates


def make_set(count: int, name: str) -> TransferSet:
    """Random images with random answers."""
    stream = generator("set", name)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=stream, dtype=torch.uint8)
    answers = torch.randn(count, CLASSES, generator=stream).softmax(1)
    return TransferSet(images, answers, torch.arange(1, count + 1))


def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights of every surrogate before it learned anything."""
    found: list[dict[str, Tensor]] = []
    real = surrogate.build

    def watched(*arguments: Any) -> nn.Module:
        network = real(*arguments)
        found.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return network

    monkeypatch.setattr(surrogate, "build", watched)
    return found


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_the_initial_weights_depend_on_name_and_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    began, data = starts(monkeypatch), make_data()
    free = transfer_set.from_labels(data["pool"], CLASSES)
    for known in (free, make_set(20, "bought"), make_set(7, "less")):
        train_surrogate(known, data)
    assert equal(began[0], began[1])
    assert equal(began[0], began[2])
    train_surrogate(free, data, name="other")
    train_surrogate(free, data, seed=1)
    assert not equal(began[0], began[3])
    assert not equal(began[0], began[4])


def test_surrogates_of_one_start_and_one_set_are_the_same_and_of_another_set_are_not() -> None:
    data = make_data()
    first, again, other = (
        train_surrogate(make_set(20, name), data).model.state_dict() for name in ("bought", "bought", "different")
    )
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize(
    ("images", "steps", "epochs"),
    [
        (16, 1, 3),  # the recipe's own epochs are enough
        (16, 3, 3),
        (16, 4, 4),  # a batch an epoch
        (17, 7, 4),  # two batches an epoch
        (17, 8, 4),
        (17, 9, 5),
        (160, 31, 4),  # ten
        (2, 500, 500),
        (3, 500, 500),
        (1600, 500, 5),
    ],
    ids=str,
)
def test_epochs_are_extended_to_the_minimum_number_of_steps(images: int, steps: int, epochs: int) -> None:
    recipe = COMMON.recipe.model_copy(update={"epochs": 3})
    found = surrogate.extend_epochs(recipe, images, steps)
    assert found == recipe.model_copy(update={"epochs": epochs})
    assert recipe.epochs == 3  # the section's own is left alone


@pytest.mark.parametrize(("images", "steps", "made"), [(7, 1, 1), (7, 5, 5), (20, 5, 6), (40, 1, 3), (40, 7, 9)])
def test_a_surrogate_makes_at_least_so_many_steps_of_the_optimiser(
    monkeypatch: pytest.MonkeyPatch, images: int, steps: int, made: int
) -> None:
    """Epochs are whole: 20 images are two batches, 40 are three."""
    counted, step = [0], Trainer.step

    def watched(run: Trainer, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        counted[0] += 1
        return step(run, images_BCHW, labels_B)

    monkeypatch.setattr(Trainer, "step", watched)
    train_surrogate(make_set(images, "steps"), make_data(), steps=steps)
    assert counted[0] == made >= steps


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("kind", ["resnet18", "cnn"])
def test_a_surrogate_needs_two_images(count: int, kind: Any) -> None:
    with pytest.raises(UserError, match=r"a surrogate needs at least two images; prepare\.splits\.pool or the budget"):
        train_surrogate(make_set(count, "few"), make_data(), kind=kind)
    assert train_surrogate(make_set(2, "few"), make_data(), kind=kind).model is not None


# ---- knockoff


@pytest.mark.parametrize("budget", [1, 20, 50])
def test_knockoff_asks_about_the_first_images_of_its_pool(budget: int) -> None:
    made = attack_setup(budget)
    run_extraction(settings("knockoff"), made.context)
    pool = query_pools.load_pool(UniformNoise(kind="noise", images=50), make_data(), generator(0, "pool", "noise"))
    assert torch.equal(torch.cat(made.batches), pool.images[:budget])
    assert made.training_sets == []


# ---- copycat


@pytest.mark.parametrize("own", [0.1, 0.25, 0.5, 0.9])
def test_copycat_mixes_its_own_images_in_evenly(own: float) -> None:
    data = make_data(pool=60)
    made = attack_setup(50, data=data)
    found = run_extraction(settings("copycat", own=own), made.context)
    mine = set(image_digests(data["pool"].images))
    is_own = torch.tensor([digest in mine for digest in image_digests(found.images)])
    for budget in range(1, 51):
        assert abs(int(is_own[:budget].sum()) - own * budget) <= 1
    assert len(set(image_digests(found.images))) == 50


@pytest.mark.parametrize("kind", ["knockoff", "copycat", "jbda"])
@pytest.mark.parametrize("budget", [2, 7, 13])
def test_a_smaller_budget_would_have_bought_the_first_queries_of_a_larger_one(kind: str, budget: int) -> None:
    large, small = attack_setup(BUDGET), attack_setup(budget)
    assert same(
        run_extraction(settings(kind), large.context).within_budget(budget),
        run_extraction(settings(kind), small.context),
    )


# ---- JBDA


@pytest.mark.parametrize("count", [1, 5, 256, 300])
@pytest.mark.parametrize("levels", [1, 10, 300])
def test_jbda_moves_every_pixel_of_a_linear_model_by_the_sign_of_its_weight(count: int, levels: int) -> None:
    model = linear()
    with torch.no_grad():
        model.weight_KP[:, 5] = 0  # a pixel that no class looks at
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator("images"), dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    with engine.attack_mode(model, "float32") as frozen:
        moved = augmented(frozen, images, labels, levels / 255)
    signs = model.weight_KP.detach().sign()[labels].view(count, 1, 8, 8).long()
    assert torch.equal(moved.long(), (images.long() + levels * signs).clamp(0, 255))
    assert moved.dtype == torch.uint8
    assert torch.equal(moved.flatten(1)[:, 5], images.flatten(1)[:, 5])


def test_a_step_between_two_levels_goes_to_the_nearest_one() -> None:
    model, images = linear(), torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    for step, levels in ((5.4 / 255, 5), (5.6 / 255, 6), (0.4 / 255, 0)):
        with engine.attack_mode(model, "float32") as frozen:
            moved = augmented(frozen, images, torch.zeros(2, dtype=torch.int64), step)
        assert set((moved.long() - 100).abs().flatten().tolist()) == {levels}


@pytest.mark.parametrize(("doublings", "total"), [(0, 6), (1, 12), (2, 24)])
def test_jbda_doubles_its_seeds(doublings: int, total: int) -> None:
    made = attack_setup(total)
    run_extraction(settings("jbda", doublings=doublings), made.context)
    assert [len(batch) for batch in made.batches] == [6, 6, 12][: doublings + 1]
    assert [len(training_set.images) for training_set in made.training_sets] == [6, 12][:doublings]


@pytest.mark.parametrize("budget", [4, 6, 7, 15])
def test_jbda_stops_at_the_budget_in_the_middle_of_a_doubling(budget: int) -> None:
    made = attack_setup(budget)
    found = run_extraction(settings("jbda"), made.context)
    assert made.oracle.used == len(found.images) == budget


def test_jbda_moves_what_it_knows_towards_the_victims_answers() -> None:
    made = attack_setup(12, learn=False)
    found = run_extraction(settings("jbda", step=10 / 255, doublings=1), made.context)
    weights = linear(seed="surrogate").weight_KP.detach()
    signs = weights.sign()[found.answers[:6].argmax(1)].view(6, 1, 8, 8).long()
    assert torch.equal(found.images[6:].long(), (found.images[:6].long() + 10 * signs).clamp(0, 255))


# ---- BEST


def best_settings(epsilon: object = "16/255", **changes: Any) -> Best:
    content = {"kind": "best", "rounds": 2, "epsilon": epsilon, "steps": 8, "step_size": 0.3} | changes
    return validate(content, Best, "test")


@pytest.mark.parametrize("count", [1, 5, 300])
def test_uncertain_images_are_where_a_linear_model_is_less_sure(count: int) -> None:
    model = linear(scale=0.2)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator("images"), dtype=torch.uint8)
    with engine.attack_mode(model, "float32") as frozen:
        moved = most_uncertain(frozen, images, best_settings())
    with torch.no_grad():
        before, after = (model(each.float() / 255).log_softmax(1) for each in (images, moved))
    evenness = after.mean(1) - before.mean(1)
    assert (evenness > 0).float().mean() > 0.95  # steps of one size overshoot where an image was even already
    assert after.max(1).values.mean() < before.max(1).values.mean() - 0.05


@pytest.mark.parametrize("epsilon", ["8/255", "16/255", "0.1"])
def test_uncertain_images_stay_within_epsilon(epsilon: str) -> None:
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=generator("images"), dtype=torch.uint8)
    made = best_settings(epsilon)
    with engine.attack_mode(linear(), "float32") as frozen:
        moved = most_uncertain(frozen, images, made)
    assert (moved.long() - images.long()).abs().max() <= made.epsilon * 255 + 1e-6
    assert not torch.equal(moved, images)


def test_best_spends_equal_shares_on_images_of_its_own_pool() -> None:
    made = attack_setup(20, learn=False)
    found = run_extraction(settings("best", epsilon="0", rounds=3), made.context)
    own = query_pools.load_pool(
        InDistribution(kind="in-distribution"), make_data(), generator(0, "pool", "in-distribution")
    )
    assert [len(batch) for batch in made.batches] == [7, 7, 6]
    assert [len(training_set.images) for training_set in made.training_sets] == [7, 14]
    assert torch.equal(found.images, own.images[:20])  # nothing may move, and no image comes before the others did


# ---- adaptive knockoff


def test_the_bandits_policy_is_a_distribution_and_prefers_rewarded_groups() -> None:
    bandit = Bandit(4)
    assert bandit.policy.tolist() == [0.25] * 4
    groups = torch.arange(80) % 4
    for _ in range(5):
        bandit.update(groups, (groups == 2).float())
        assert float(bandit.policy.sum()) == pytest.approx(1)
    assert int(bandit.policy.argmax()) == 2
    assert float(bandit.policy[2]) > 0.3
    drawn = bandit.sample(torch.arange(4000) % 4, torch.ones(4000, dtype=torch.bool), 200, generator("draw"))
    assert int(torch.bincount(drawn % 4).argmax()) == 2


def test_one_step_of_the_bandit_by_hand() -> None:
    bandit = Bandit(2)
    bandit.update(torch.tensor([0]), torch.tensor([1.0]))
    # surprise 1 - 0, rate 1/1, chosen minus policy (1/2, -1/2)
    assert bandit.preferences_G.tolist() == pytest.approx([0.5, -0.5])
    assert (bandit.mean_reward, bandit.draws_G.tolist()) == (1.0, [1.0, 0.0])
    bandit.update(torch.tensor([1]), torch.tensor([0.5]))
    # surprise 1/2 - 1, policy of group 0: e / (e + 1), of which half a preference moves to group 0
    share = 0.7310585786
    assert bandit.preferences_G.tolist() == pytest.approx([0.5 + 0.5 * share, -0.5 - 0.5 * share])
    assert bandit.mean_reward == pytest.approx(0.75)
    bandit.update(torch.tensor([0]), torch.tensor([0.75]))  # no surprise, no change
    assert bandit.preferences_G.tolist() == pytest.approx([0.5 + 0.5 * share, -0.5 - 0.5 * share])
    assert bandit.draws_G.tolist() == [2.0, 1.0]


def test_positions_are_sampled_without_replacement_and_only_if_available() -> None:
    bandit, groups = Bandit(3), torch.arange(60) % 3
    bandit.update(groups[:30], (groups[:30] == 1).float() * 50)  # a policy that is nearly certain
    is_open = torch.arange(60) >= 20
    for count in (1, 13, 40):
        rows = bandit.sample(groups, is_open, count, generator("choose", count))
        assert len(set(rows.tolist())) == count
        assert is_open[rows].all()


def test_a_group_is_as_likely_as_its_policy_however_many_images_it_has() -> None:
    bandit, groups = Bandit(2), (torch.arange(100) >= 90).long()
    stream, is_open = generator("groups"), torch.ones(100, dtype=torch.bool)
    drawn = torch.cat([bandit.sample(groups, is_open, 1, stream) for _ in range(1000)])
    assert abs(float((drawn >= 90).float().mean()) - 0.5) < 0.06
    assert len(set(drawn[drawn < 90].tolist())) > 80


def test_rewards_lie_between_0_and_1_and_name_the_better_image() -> None:
    stream = generator("rewards")
    answers = torch.rand(30, CLASSES, generator=stream).softmax(1)
    guesses = torch.randn(30, CLASSES, generator=stream)
    found = rewards(answers, answers[:10], guesses)
    assert found.shape == (30,)
    assert found.min() >= 0
    assert found.max() <= 1
    told = torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.3, 0.3]])
    sure_rare_and_unforeseen, dull = rewards(told, torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[5.0, 0, 0]] * 2))
    assert (float(sure_rare_and_unforeseen), float(dull)) == (1.0, 0.0)


def test_rewards_of_equal_answers_are_0_and_no_division_by_it() -> None:
    told = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, -1)
    assert rewards(told, told, torch.zeros(4, CLASSES)).tolist() == [0.0] * 4


def test_adaptive_knockoff_learns_after_every_round_and_asks_nothing_twice() -> None:
    made = attack_setup(20)
    found = run_extraction(settings("knockoff-adaptive"), made.context)
    assert [len(batch) for batch in made.batches] == [6, 7, 7]
    assert [len(training_set.images) for training_set in made.training_sets] == [6, 13]
    assert len(set(image_digests(found.images))) == 20


def test_adaptive_knockoff_queries_the_rewarded_group_more() -> None:
    """Group 1 surprises the surrogate, the others never do."""
    images = torch.randint(0, 256, (300, 1, 8, 8), generator=generator("groups"), dtype=torch.uint8)
    groups = torch.arange(300) % 3
    images[:, 0, 0, 0] = groups.to(torch.uint8)

    def ask(asked_NCHW: Tensor) -> Tensor:
        is_one = (asked_NCHW[:, 0, 0, 0] == 1).float()[:, None]
        return is_one * torch.tensor([0.0, 0.0, 1.0]) + (1 - is_one) * torch.tensor([0.4, 0.3, 0.3])

    made = attack_setup(120, learn=False)
    oracle = Oracle(ask, "soft", 120)
    surprised = Linear(torch.zeros(CLASSES, 64))
    context = AttackContext(
        oracle,
        lambda _: Candidates(images, groups),
        lambda _: surprised,
        made.context.build_surrogate,
        generator("a"),
        GREY,
    )
    found = run_extraction(settings("knockoff-adaptive", rounds=12), context)
    last = found.images[-50:, 0, 0, 0]
    assert (last == 1).float().mean() > 0.5


# ---- DFME


@pytest.mark.parametrize("budget", [12, 23, 24, 50])
def test_data_free_extraction_never_exceeds_the_budget_and_keeps_every_probe(budget: int) -> None:
    made = attack_setup(budget)
    found = run_extraction(settings("dfme"), made.context)
    assert made.oracle.used == len(found.images) == budget // 12 * 12
    assert [len(batch) for batch in made.batches] == [3] * (budget // 12 * 4)
    assert torch.equal(found.images, torch.cat(made.batches))


@pytest.mark.parametrize("facts", [GREY, COLOUR, GREY.model_copy(update={"height": 9, "width": 10})], ids=str)
def test_the_generator_makes_images_in_the_victims_size(facts: DatasetInfo) -> None:
    made = settings("dfme")
    assert isinstance(made, Dfme)
    images = Generator(made, facts)(torch.randn(3, 4, generator=generator("latent")))
    assert images.shape == (3, facts.channels, facts.height, facts.width)
    assert images.min() >= 0
    assert images.max() <= 1


def watch_generators(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[Dfme, DatasetInfo], nn.Module] = Generator
) -> list[Any]:
    """Returns a list that receives the generator and its initial weights."""
    made: list[Any] = []

    def watched(chosen: Dfme, facts: DatasetInfo) -> nn.Module:
        network = make(chosen, facts)
        made.extend([network, [parameter.detach().clone() for parameter in network.parameters()]])
        return network

    monkeypatch.setattr(data_free, "Generator", watched)
    return made


def test_the_generator_learns_and_the_global_stream_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, made = watch_generators(monkeypatch), attack_setup(24)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run_extraction(settings("dfme"), made.context)
    network, old = watched
    assert torch.equal(torch.random.get_rng_state(), before)
    moved = [not torch.equal(now, then) for now, then in zip(network.parameters(), old, strict=True)]
    assert sum(moved) >= len(moved) - 2  # a bias in front of a normalisation has no gradient


def test_the_surrogate_is_evaluated_in_eval_mode_from_the_first_query_on() -> None:
    """In train mode the updates of the generator would change its BatchNorm statistics."""
    made, modes = attack_setup(12), []
    real = made.context.build_surrogate

    def fresh() -> nn.Module:
        network = real()
        network.register_forward_pre_hook(lambda module, _: modes.append(module.training))
        return network

    context = AttackContext(
        made.oracle, made.context.load_pool, made.context.train_surrogate, fresh, made.context.stream, GREY
    )
    run_extraction(settings("dfme"), context)
    assert modes == [False, False, True, True]  # twice for the generator, then two surrogate updates


class SingleImage(nn.Module):
    """A generator that is a single image."""

    def __init__(self, chosen: Dfme, facts: DatasetInfo) -> None:
        super().__init__()
        self.batch = chosen.batch_size
        self.image = nn.Parameter(torch.zeros(1, facts.channels, facts.height, facts.width))

    def forward(self, latent_BZ: Tensor) -> Tensor:
        return self.image.sigmoid().expand(len(latent_BZ), -1, -1, -1)


@dataclass
class TrainerSetup:
    """A DFME trainer on one image, with its surrogate and the victim's network."""

    trainer: Any
    canvas: SingleImage
    surrogate_model: Linear
    theirs: Linear

    def disagreement(self, pixels_BCHW: Tensor) -> Tensor:
        """The L1 distance of the centred logits (B,), with gradients in the pixels."""
        gap: Tensor = self.surrogate_model(pixels_BCHW).log_softmax(1) - self.theirs(pixels_BCHW).log_softmax(1)
        return (gap - gap.mean(1, keepdim=True)).abs().sum(1)


def trainer_setup(
    monkeypatch: pytest.MonkeyPatch,
    *,
    lr: float,
    scale: float = 1.0,
    make: type[SingleImage] = SingleImage,
    **changes: Any,
) -> TrainerSetup:
    monkeypatch.setattr(data_free, "GENERATOR_LR", lr)
    chosen = settings("dfme", batch_size=2, **changes)
    assert isinstance(chosen, Dfme)
    canvas, surrogate_model, theirs = (
        make(chosen, GREY),
        linear(seed="surrogate", scale=0.3 * scale),
        linear(seed="victim", scale=scale),
    )
    oracle = Oracle(victims._network_victim("linear", "id", theirs, CLASSES).query, "soft", 10**6)
    made = attack_setup(10**6).context
    context = AttackContext(
        oracle, made.load_pool, made.train_surrogate, lambda: surrogate_model, generator("thief"), GREY
    )
    return TrainerSetup(data_free._DfmeTrainer(chosen, context, canvas), canvas, surrogate_model, theirs)  # type: ignore[arg-type]


def test_the_generator_moves_towards_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = trainer_setup(monkeypatch, lr=0.05, directions=10, step=4)

    def now() -> float:
        with torch.no_grad():
            return float(setup.disagreement(setup.canvas.image.sigmoid()))

    before = now()
    for _ in range(15):
        setup.trainer.update_generator()
    assert now() > 1.3 * before


def levels_of(count: int = 400) -> Tensor:
    """Images of every level, with many pixels at the border and next to it."""
    stream = generator("levels")
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=stream, dtype=torch.uint8)
    images[:, :, 0], images[:, :, 1], images[:, :, 2], images[:, :, 3] = 0, 255, 3, 252
    return images


@pytest.mark.parametrize("step", [1, 5, 300])
def test_probes_move_every_pixel_by_whole_levels_and_return_the_change(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    images = levels_of()
    before = images.clone()
    moved, taken = trainer_setup(monkeypatch, lr=0.0, step=step).trainer._perturb(images)
    assert torch.equal(images, before)
    assert moved.dtype == torch.uint8
    assert taken.dtype == torch.float32
    change = moved.long() - images.long()
    assert torch.equal((taken * 255).round().long(), change)
    assert torch.allclose(taken, change.float() / 255, atol=1e-7)
    # either as far as the step goes, or to the border that lies nearer
    up, down = (images.long() + step).clamp(max=255), (images.long() - step).clamp(min=0)
    assert ((moved == up) | (moved == down)).all()
    inside = (images.long() >= step) & (images.long() <= 255 - step)
    assert (change[inside].abs() == step).all()
    assert (change[~inside].abs() <= step).all()
    # each sign half of the time, for every pixel on its own
    assert float((moved == up).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((moved == up).float().mean(0).std()) < 0.05
    assert float((moved == up).flatten(1).float().mean(1).std()) < 0.1


def test_at_one_level_every_pixel_inside_moves_by_one_and_a_saturated_one_may_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = levels_of()
    moved, taken = trainer_setup(monkeypatch, lr=0.0, step=1).trainer._perturb(images)
    change = moved.long() - images.long()
    inside = (images > 0) & (images < 255)
    assert set(change[inside].tolist()) == {-1, 1}
    assert set(change[images == 0].tolist()) == {0, 1}
    assert set(change[images == 255].tolist()) == {0, -1}
    assert torch.equal(taken == 0, change == 0)
    assert float(taken[inside].abs().max()) == pytest.approx(1 / 255)


def test_probes_depend_on_the_trainers_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (trainer_setup(monkeypatch, lr=0.0, step=2).trainer for _ in range(2))
    images = levels_of()
    probes = [each._perturb(images)[0] for each in (first, first, again)]
    assert not torch.equal(probes[0], probes[1])
    assert torch.equal(probes[0], probes[2])


class PixelImage(SingleImage):
    """A generator whose weights are the pixels themselves: their gradient is the estimate."""

    def __init__(self, chosen: Dfme, facts: DatasetInfo) -> None:
        super().__init__(chosen, facts)
        stream = generator("plate")
        self.image = nn.Parameter(torch.randint(30, 226, (1, 1, 8, 8), generator=stream).float() / 255)

    def forward(self, latent_BZ: Tensor) -> Tensor:
        return self.image.expand(len(latent_BZ), -1, -1, -1)


def estimate(setup: TrainerSetup) -> Tensor:
    """The estimated gradient of the disagreement in the pixels (P,)."""
    setup.trainer.update_generator()
    gradient = setup.canvas.image.grad
    assert gradient is not None
    return -gradient.flatten()


@pytest.mark.parametrize("step", [1, 4])
def test_the_estimate_averages_to_the_gradient(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """D directions in P pixels: a cosine of the root of D / (D + P), and no bias in its length."""
    setup = trainer_setup(monkeypatch, lr=0.0, scale=0.1, make=PixelImage, directions=300, step=step)
    found = estimate(setup)
    pixels = setup.canvas.image.detach().clone().requires_grad_()
    setup.disagreement(pixels).sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    expected = pixels.grad.flatten()
    cosine = float(nn.functional.cosine_similarity(found, expected, dim=0))
    assert cosine > 0.85  # twice 300 directions, one batch of two
    assert float(found @ expected / expected.square().sum()) == pytest.approx(1, abs=0.15)


def test_an_estimate_from_a_single_direction_points_uphill_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = trainer_setup(monkeypatch, lr=0.0, scale=0.1, make=PixelImage, directions=1, step=1)
    pixels = setup.canvas.image.detach().clone().requires_grad_()
    setup.disagreement(pixels).sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    expected = pixels.grad.flatten()
    cosines = [float(nn.functional.cosine_similarity(estimate(setup), expected, dim=0)) for _ in range(40)]
    assert min(cosines) > -0.05  # a difference along a line never points down it, but for what the curve adds
    assert sum(cosines) / len(cosines) > 0.05


class Saturated(PixelImage):
    """Half of the pixels at a border, where only one of the two signs moves them."""

    def __init__(self, chosen: Dfme, facts: DatasetInfo) -> None:
        super().__init__(chosen, facts)
        with torch.no_grad():
            self.image[:, :, :2], self.image[:, :, 2:4] = 0, 1


@pytest.mark.parametrize("step", [1, 40])
def test_the_slope_is_computed_from_the_clipped_change(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Along its own probe the estimate of a linear disagreement is exact, saturated pixels or not."""
    setup = trainer_setup(monkeypatch, lr=0.0, make=Saturated, directions=1, step=step)
    weight = torch.randn(64, generator=generator("slope"))
    probes: list[tuple[Tensor, Tensor]] = []
    real = setup.trainer._perturb

    def watched(levels: Tensor) -> tuple[Tensor, Tensor]:
        probes.append((levels, real(levels)[0]))
        moved = probes[-1][1]
        return moved, (moved.int() - levels.int()).float() / 255

    setup.trainer._perturb = watched
    setup.trainer._disagreement = lambda levels: levels.flatten(1).float() / 255 @ weight
    found = estimate(setup)
    ((levels, moved),) = probes
    taken = (moved.long() - levels.long()).flatten(1).float() / 255
    assert (taken == 0).float().mean() > 0.1
    rise = taken @ weight
    # both images of the batch have a probe of their own; the gradient is their mean
    expected = (rise / taken.square().sum(1))[:, None] * taken * 64
    assert torch.allclose(found, expected.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [0, 0.5, 2.0, -1], ids=str)
def test_a_step_of_data_free_extraction_is_a_whole_number_of_levels(step: float) -> None:
    with pytest.raises(UserError, match="step: "):
        settings("dfme", step=step)


def test_every_probe_differs_from_the_generated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step below one level would be rounded away, and the slope with it."""
    made = attack_setup(12)
    watch_generators(monkeypatch)
    run_extraction(settings("dfme", step=1), made.context)
    painted, moved = made.batches[0].long(), made.batches[1].long()
    assert (painted != moved).float().mean() > 0.99
    assert (painted - moved).abs().max() == 1


# ---- transfer sets


def test_a_transfer_set_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = attack_setup(20, mode="rounded-2")
    found = run_extraction(settings("jbda"), made.context)
    path = tmp_path / "set.safetensors"
    keep = {"about": {}, "params": {}, "inputs": {"victim": "sha256"}, "seed": 0, "seconds": 1.0}
    sha256 = transfer_set.save(path, found, made.oracle.query_log, **keep)  # type: ignore[arg-type]
    assert same(transfer_set.load(path), found)
    from advmoe.core import artifacts

    read = artifacts.load(path, transfer_set.KIND)
    assert read.header.sha256 == sha256
    assert [bytes(row.tolist()).hex() for row in read.tensors["log"]] == made.oracle.query_log


def test_a_file_that_is_no_transfer_set_is_refused(tmp_path: Path) -> None:
    from advmoe.core import artifacts

    nothing: Mapping[str, Any] = {"about": {}, "params": {}, "inputs": {}, "seed": 0, "metrics": {}, "seconds": 0.0}
    path = tmp_path / "set.safetensors"
    artifacts.save(path, transfer_set.KIND, {"images": torch.zeros(1)}, **nothing)
    with pytest.raises(UserError, match=r"set.safetensors: has no tensor 'answers'"):
        transfer_set.load(path)
    artifacts.save(path, "dataset", {"images": torch.zeros(1)}, **nothing)
    with pytest.raises(UserError, match="holds a dataset"):
        transfer_set.load(path)
    with pytest.raises(UserError, match="no such file"):
        transfer_set.load(tmp_path / "nothing.safetensors")


def test_within_budget_keeps_queries_up_to_the_budget_and_free_labels() -> None:
    free = transfer_set.from_labels(make_split(make_data()["pool"].images[:4]), CLASSES)
    assert free.queries.tolist() == [0] * 4
    assert free.answers.argmax(1).tolist() == [0, 1, 2, 0]
    bought = run_extraction(settings("knockoff"), attack_setup(10).context)
    both = transfer_set.concatenate(free, bought)
    assert len(both.within_budget(0).images) == 4
    assert torch.equal(both.within_budget(3).images, torch.cat([free.images, bought.images[:3]]))
    assert same(both.within_budget(10), both)


@pytest.mark.parametrize("own", [0.0, 1.0, -0.1])
def test_copycat_refuses_shares_outside_0_and_1(own: float) -> None:
    with pytest.raises(UserError, match="own"):
        validate(KINDS["copycat"] | {"own": own}, Copycat, "test")

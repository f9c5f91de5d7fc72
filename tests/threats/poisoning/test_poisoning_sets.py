"""Poisoned sets: what each attack changes, what it leaves alone, that it can be repeated, and what it refuses.

Shapes: N training images, M poisoned ones, C channel, H/W pixels, K classes.
"""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks.ball import round_to_uint8
from advmoe.core import artifacts
from advmoe.core.artifacts import hash_tensors
from advmoe.core.errors import UserError
from advmoe.data.batches import Augmentation
from advmoe.data.dataset import DatasetInfo, Split
from advmoe.models import classifiers, inference
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback, checkpointing
from advmoe.runtime.machine import generator
from advmoe.threats.poisoning import label_consistent, poisoned_set, unlearnable, witches_brew
from advmoe.threats.poisoning.badnets import BadNets
from advmoe.threats.poisoning.blended import Blended
from advmoe.threats.poisoning.error_maximising import ErrorMaximising
from advmoe.threats.poisoning.label_consistent import LabelConsistent
from advmoe.threats.poisoning.label_flip import PairFlip, RandomFlip, TargetedFlip
from advmoe.threats.poisoning.poisoned_set import Goal, PoisonedSet, PoisonedSetInfo, Trigger
from advmoe.threats.poisoning.preview import example_grid
from advmoe.threats.poisoning.registry import AnyPoisonAttack, poison, proxy_baselines, trials_per_rate, with_target
from advmoe.threats.poisoning.unlearnable import Unlearnable
from advmoe.threats.poisoning.witches_brew import WitchesBrew

CLASSES, EACH = 4, 12
COUNT = CLASSES * EACH
FACTS = DatasetInfo(channels=1, height=8, width=8, class_names=("a", "b", "c", "d"), mean=(0.5,), std=(0.25,))
PLAIN = PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="resnet18", width=2))
EIGHT = 8 / 255
SET, OFF = "the training set", Augmentation(crop=0, flip=False)


@dataclass(frozen=True)
class AttackCase:
    """An attack at some rate, and how many images of how many it must change, by at most how many levels."""

    settings: AnyPoisonAttack
    rate: float
    changed: int
    available: int
    rate_of: str
    true_labels: bool
    levels: int | None = None


UNLEARNABLE: dict[str, Any] = {
    "kind": "unlearnable",
    "epsilon": EIGHT,
    "steps": 3,
    "step_size": 0.5,
    "rounds": 2,
    "learning_steps": 2,
    "batch_size": 8,
    "lr": 0.05,
    "stop": 0.0,
}
BREW: dict[str, Any] = {
    "kind": "witches-brew",
    "epsilon": EIGHT,
    "steps": 4,
    "step_size": 0.3,
    "restarts": 1,
    "targets": 2,
    "proxy": "standard",
}
ATTACK_CASES = {
    "label-flip-random": AttackCase(RandomFlip(kind="label-flip-random"), 0.25, 12, COUNT, SET, False),
    "label-flip-pair": AttackCase(PairFlip(kind="label-flip-pair"), 0.25, 12, COUNT, SET, False),
    "label-flip-targeted": AttackCase(
        TargetedFlip(kind="label-flip-targeted", source=1, target=3), 0.25, 3, EACH, "class 1", False
    ),
    "badnets": AttackCase(BadNets(kind="badnets", size=2, target=0), 0.25, 12, COUNT, SET, False),
    "blended": AttackCase(Blended(kind="blended", alpha=0.2, target=0), 0.25, 12, COUNT, SET, False),
    "label-consistent": AttackCase(
        LabelConsistent(
            kind="label-consistent", size=2, target=2, epsilon=EIGHT, steps=4, step_size=0.5, proxy="standard"
        ),
        0.5,
        6,
        EACH,
        "class 2",
        True,
        8,
    ),
    "witches-brew": AttackCase(WitchesBrew(**BREW), 0.125, 6, COUNT, SET, True, 8),
    "unlearnable": AttackCase(Unlearnable(**UNLEARNABLE), 1.0, COUNT, COUNT, SET, True, 8),
    "error-maximising": AttackCase(
        ErrorMaximising(kind="error-maximising", epsilon=EIGHT, steps=4, step_size=0.5, proxy="standard"),
        1.0,
        COUNT,
        COUNT,
        SET,
        True,
        8,
    ),
}
NAMES = pytest.mark.parametrize("name", ATTACK_CASES)


def make_split(count: int = COUNT, name: str = "train") -> Split:
    """Noisy copies of four fixed patterns."""
    patterns = torch.randint(40, 216, (CLASSES, 1, 8, 8), generator=generator("test_poisoning", "patterns"))
    noise = torch.randint(-30, 31, (count, 1, 8, 8), generator=generator("test_poisoning", "noise", name))
    labels = torch.arange(count) % CLASSES
    return Split((patterns[labels] + noise).to(torch.uint8), labels, torch.arange(count))


def network(seed: int) -> nn.Module:
    return classifiers.build(PLAIN, FACTS, seed).eval()


@lru_cache(maxsize=1)
def trained() -> nn.Module:
    """A proxy that is right about nearly all images."""
    model, split = network(1).train(), make_split()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(model(split.pixels()), split.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    assert accuracy(model, split.images, split.labels) > 0.9
    return model


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return inference.predict(model, images.float() / 255, COUNT)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((logits_of(model, images).argmax(1) == labels).float().mean())


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float(functional.cross_entropy(logits_of(model, images), labels))


class StubContext:
    """An `AttackContext`; `network` is the last untrained network that it returned."""

    classes = CLASSES

    def __init__(self, augmentation: Augmentation = OFF) -> None:
        self.augmentation = augmentation
        self.candidates = make_split(24, "test")
        self.network = network(9)

    def proxy(self, baseline: str) -> nn.Module:
        assert baseline == "standard"
        return trained()

    def untrained_network(self) -> nn.Module:
        self.network = network(9)
        return self.network

    def checkpointing(self, work: Resumable) -> AbstractContextManager[StepCallback]:
        return checkpointing(work, "", None)


def make(name: str, seed: int = 0, rate: float | None = None, **changes: Any) -> PoisonedSet:
    case = ATTACK_CASES[name]
    settings = case.settings.model_copy(update=changes)
    return poison(make_split(), generator("poison", seed), settings, case.rate if rate is None else rate, StubContext())


def equal(left: PoisonedSet, right: PoisonedSet) -> bool:
    """Bit for bit, triggers and all."""

    def tensors(made: PoisonedSet) -> dict[str, Tensor]:
        found = {"images": made.images, "labels": made.labels, "rows": made.rows, "true": made.true_labels}
        if made.trigger is not None:
            found |= {"opacity": made.trigger.opacity, "pattern": made.trigger.pattern}
        return found if made.target_image is None else found | {"wanted": made.target_image}

    same = (left.rate_of, left.available, left.goal) == (right.rate_of, right.available, right.goal)
    return same and hash_tensors(tensors(left)) == hash_tensors(tensors(right))


# ---- what holds for every attack


@NAMES
def test_the_amount_is_the_rate_of_the_named_denominator(name: str) -> None:
    case, made = ATTACK_CASES[name], make(name)
    assert (len(made.rows), made.available, made.rate_of) == (case.changed, case.available, case.rate_of)
    assert len(made.rows) == round(case.rate * made.available)
    assert int(made.is_poison.sum()) == case.changed
    assert made.is_poison[made.rows].all()
    assert made.rows.tolist() == sorted(set(made.rows.tolist()))


@NAMES
def test_what_is_not_poisoned_stays_byte_for_byte(name: str) -> None:
    clean, made = make_split(), make(name)
    kept = ~made.is_poison
    assert torch.equal(made.images[kept], clean.images[kept])
    assert torch.equal(made.labels[kept], clean.labels[kept])
    assert (made.images.dtype, made.images.shape) == (torch.uint8, clean.images.shape)


@NAMES
def test_the_clean_set_is_not_written_to(name: str) -> None:
    clean = make_split()
    before = hash_tensors({"images": clean.images, "labels": clean.labels})
    poison(clean, generator(0), ATTACK_CASES[name].settings, ATTACK_CASES[name].rate, StubContext())
    assert hash_tensors({"images": clean.images, "labels": clean.labels}) == before


@NAMES
def test_labels_are_wrong_or_unchanged(name: str) -> None:
    clean, made = make_split(), make(name)
    assert torch.equal(made.true_labels, clean.labels[made.rows])
    differs = made.labels[made.rows] != made.true_labels
    assert not differs.any() if ATTACK_CASES[name].true_labels else differs.all()


@NAMES
def test_an_equal_stream_gives_the_same_set_and_another_does_not(name: str) -> None:
    assert equal(make(name, seed=1), make(name, seed=1))
    assert not equal(make(name, seed=1), make(name, seed=2))


@NAMES
def test_the_global_random_state_neither_matters_nor_moves(name: str) -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        made.append(make(name))
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert equal(*made)


@pytest.mark.parametrize("name", [name for name, case in ATTACK_CASES.items() if case.levels is not None])
def test_noise_stays_inside_the_ball_in_whole_levels(name: str) -> None:
    clean, made, levels = make_split(), make(name), ATTACK_CASES[name].levels
    change = (made.images.int() - clean.images.int()).abs()
    if made.trigger is not None:
        change = change * (made.trigger.opacity == 0)
    assert change.max() == levels  # inside, and the ball is used to its edge


@NAMES
def test_a_higher_rate_contains_a_lower_one(name: str) -> None:
    case = ATTACK_CASES[name]
    low, high = make(name, rate=case.rate / 2), make(name)
    assert len(low.rows) < len(high.rows)
    assert set(low.rows.tolist()) < set(high.rows.tolist())
    if case.levels is None:  # no noise is drawn: what is changed, is changed in the same way
        assert torch.equal(high.images[low.rows], low.images[low.rows])
        assert torch.equal(high.labels[low.rows], low.labels[low.rows])


# ---- labels


def test_random_flips_reach_every_other_label() -> None:
    made = make("label-flip-random", rate=0.9)
    pairs = set(zip(made.true_labels.tolist(), made.labels[made.rows].tolist(), strict=True))
    assert pairs == {(true, lie) for true in range(CLASSES) for lie in range(CLASSES) if true != lie}


def test_random_flips_are_even() -> None:
    images, labels = torch.zeros(6000, 1, 2, 2, dtype=torch.uint8), torch.zeros(6000, dtype=torch.int64)
    split, settings = Split(images, labels, torch.arange(6000)), RandomFlip(kind="label-flip-random")
    made = poison(split, generator(0), settings, 0.5, StubContext())
    counts = torch.bincount(made.labels[made.rows], minlength=CLASSES)
    assert counts[0] == 0
    assert counts[1:].tolist() == pytest.approx([1000] * 3, abs=100)


def test_pair_flips_go_to_the_next_class() -> None:
    made = make("label-flip-pair", rate=0.9)
    assert torch.equal(made.labels[made.rows], (made.true_labels + 1) % CLASSES)
    assert made.goal == Goal()


def test_targeted_flips_take_a_share_of_the_source_class() -> None:
    made = make("label-flip-targeted", rate=0.5)
    assert len(made.rows) == 6  # half of the twelve, not of the set
    assert set(made.true_labels.tolist()) == {1}
    assert set(made.labels[made.rows].tolist()) == {3}
    assert made.goal == Goal(target=3, source=1)
    assert torch.equal(made.images, make_split().images)


def test_label_flips_change_no_image() -> None:
    for name in ("label-flip-random", "label-flip-pair", "label-flip-targeted"):
        assert torch.equal(make(name).images, make_split().images)
        assert make(name).trigger is None


# ---- backdoors


def test_the_patch_is_white_in_the_bottom_right_corner() -> None:
    clean, made = make_split(), make("badnets")
    expected = clean.images[made.rows].clone()
    expected[:, :, 6:, 6:] = 255
    assert torch.equal(made.images[made.rows], expected)
    assert set(made.labels[made.rows].tolist()) == {0}
    assert 0 not in made.true_labels.tolist()  # images of the target class would be no lie
    assert made.goal == Goal(target=0)


def test_the_patch_meets_test_images_as_it_met_training_images() -> None:
    clean, made = make_split(), make("badnets")
    assert made.trigger is not None
    assert torch.equal(made.trigger.stamp(clean.images)[made.rows], made.images[made.rows])


def test_a_patch_may_be_as_large_as_the_image() -> None:
    assert (make("badnets", size=8).images[make("badnets", size=8).rows] == 255).all()


def test_blending_is_the_formula() -> None:
    clean, made = make_split(), make("blended")
    assert made.trigger is not None
    pattern = made.trigger.pattern.double().numpy()
    exact = 0.8 * clean.images[made.rows].double().numpy() + 0.2 * pattern
    assert np.abs(made.images[made.rows].double().numpy() - exact).max() <= 0.5 + 1e-4  # the nearest level
    assert pattern.std() > 40  # noise over the whole range, not a constant
    assert pattern.min() < 30
    assert pattern.max() > 225


def test_one_pattern_serves_all_images_and_rates() -> None:
    low, high = make("blended", rate=0.05), make("blended", rate=0.5)
    assert low.trigger is not None
    assert high.trigger is not None
    assert torch.equal(low.trigger.pattern, high.trigger.pattern)


def test_a_trigger_has_its_place_in_every_channel() -> None:
    images = torch.zeros(8, 3, 5, 7, dtype=torch.uint8)
    split = Split(images, torch.arange(8) % CLASSES, torch.arange(8))
    made = poison(split, generator(0), BadNets(kind="badnets", size=3, target=1), 0.5, StubContext())
    expected = torch.zeros(3, 5, 7, dtype=torch.uint8)
    expected[:, 2:, 4:] = 255
    assert (made.images[made.rows] == expected).all()


def test_label_consistent_images_are_hard_before_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    before_the_patch: list[Tensor] = []

    def spy(*arguments: Any) -> Tensor:
        before_the_patch.append(round_to_uint8(*arguments))
        return before_the_patch[-1]

    monkeypatch.setattr(label_consistent, "round_to_uint8", spy)
    clean, made = make_split(), make("label-consistent", epsilon=0.2)
    (hard,) = before_the_patch
    assert set(made.true_labels.tolist()) == {2}
    assert made.trigger is not None
    # the order in which they were drawn is not the order in which they are stored
    stamped = {bytes(image.numpy().tobytes()) for image in made.trigger.stamp(hard)}
    assert stamped == {bytes(image.numpy().tobytes()) for image in made.images[made.rows]}
    labels = torch.full((len(hard),), 2)
    assert loss_of(trained(), hard, labels) > loss_of(trained(), clean.images[made.rows], labels) + 0.5
    assert made.goal == Goal(target=2)


# ---- witches' brew


def gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Of the mean cross-entropy, by all weights, in one row."""
    loss = functional.cross_entropy(model(pixels), labels)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def apart(made: PoisonedSet, images: Tensor) -> float:
    """1 - cosine between the gradient of `images` and that of the wanted mistake."""
    assert made.target_image is not None
    wanted = made.target_image[None].float() / 255
    goal = gradient(trained(), wanted, torch.tensor([made.goal.target]))
    found = gradient(trained(), images[made.rows].float() / 255, made.labels[made.rows])
    return 1 - float(functional.cosine_similarity(goal, found, dim=0))


def test_the_brew_comes_closer_to_the_gradient_of_the_mistake() -> None:
    made = make("witches-brew", epsilon=0.2, steps=16, step_size=0.2)
    assert apart(made, made.images) < apart(made, make_split().images) - 0.03


def test_the_brew_leaves_the_proxy_as_it_was() -> None:
    model = trained()
    before = hash_tensors(model.state_dict())
    make("witches-brew")
    assert hash_tensors(model.state_dict()) == before
    assert [parameter.grad for parameter in model.parameters() if parameter.grad is not None] == []
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_brew_wants_a_mistake_about_an_image_that_the_proxy_gets_right() -> None:
    context = StubContext()
    seen = set()
    for seed in range(12):
        made = make("witches-brew", seed, steps=1)
        assert made.target_image is not None
        (row,) = [row for row, image in enumerate(context.candidates.images) if torch.equal(image, made.target_image)]
        assert made.goal.source == int(context.candidates.labels[row])
        assert int(logits_of(trained(), made.target_image[None]).argmax()) == made.goal.source
        assert made.goal.target != made.goal.source
        assert set(made.true_labels.tolist()) == {made.goal.target}
        seen.add(row)
    assert len(seen) > 3  # one lucky target is no rate


def test_the_brew_needs_an_image_that_the_proxy_gets_right() -> None:
    context = StubContext()
    predicted = logits_of(trained(), context.candidates.images).argmax(1)
    context.candidates = replace(context.candidates, labels=(predicted + 1) % CLASSES)
    with pytest.raises(UserError, match="the proxy classifies no test image correctly"):
        poison(make_split(), generator(0), ATTACK_CASES["witches-brew"].settings, 0.1, context)


def test_the_best_of_several_restarts_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.7, 0.2, 0.4])

    def scripted(_proxy: nn.Module, images: Tensor, *_: Any) -> tuple[Tensor, float]:
        distance = next(found)
        return images + distance / 100, distance

    monkeypatch.setattr(witches_brew, "_optimize_perturbation", scripted)
    made = make("witches-brew", restarts=3)
    change = made.images[made.rows].int() - make_split().images[made.rows].int()
    assert set(change.flatten().tolist()) == {round(0.2 / 100 * 255)}


def test_the_brew_is_matched_through_the_victims_augmentation() -> None:
    settings = ATTACK_CASES["witches-brew"].settings
    plain, cropped = (
        poison(make_split(), generator(0), settings, 0.1, StubContext(augmentation))
        for augmentation in (OFF, Augmentation(crop=2, flip=True))
    )
    assert torch.equal(plain.rows, cropped.rows)
    assert not torch.equal(plain.images, cropped.images)


def test_large_poison_is_matched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witches_brew, "BATCH_SIZE", 4)
    made = make("witches-brew", epsilon=0.2, steps=16, step_size=0.2)
    assert apart(made, made.images) < apart(made, make_split().images) - 0.03


# ---- availability attacks


def test_unlearnable_noise_is_easy_for_the_network_that_learned_it() -> None:
    context, clean = StubContext(), make_split()
    settings = Unlearnable(**UNLEARNABLE | {"epsilon": 0.2, "rounds": 4, "learning_steps": 5, "steps": 5})
    made = poison(clean, generator(0), settings, 1.0, context)
    learned = context.network
    assert loss_of(learned, made.images, made.labels) < loss_of(learned, clean.images, clean.labels) - 0.1


def test_unlearnable_noise_stops_when_it_explains_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = list[int]()
    errors = iter([0.6, 0.3, 0.1])
    monkeypatch.setattr(
        unlearnable._NoiseOptimization, "_train_network", lambda _self, labels: rounds.append(len(labels))
    )
    monkeypatch.setattr(unlearnable._NoiseOptimization, "_error_rate", lambda *_: next(errors))
    make("unlearnable", rounds=3, stop=0.3)
    assert rounds == [COUNT, COUNT]


def test_error_maximising_images_are_taken_for_the_next_class() -> None:
    made = make("error-maximising", epsilon=0.5, steps=30, step_size=0.1)
    predicted = logits_of(trained(), made.images).argmax(1)
    assert float((predicted == (made.labels + 1) % CLASSES).float().mean()) > 0.9


@pytest.mark.parametrize("name", ["unlearnable", "error-maximising", "label-consistent"])
def test_the_proxy_is_left_as_it_was(name: str) -> None:
    before = hash_tensors(trained().state_dict())
    make(name)
    assert hash_tensors(trained().state_dict()) == before
    assert [parameter.grad for parameter in trained().parameters() if parameter.grad is not None] == []


@pytest.mark.parametrize("epsilon", [0.0, 1 / 255, EIGHT, 0.1, 0.2])
def test_levels_never_leave_the_ball(epsilon: float) -> None:
    images = make_split().images
    points = images.float() / 255 + (torch.rand(images.shape, generator=generator("levels")) * 2 - 1) * 2 * epsilon
    levels = round_to_uint8(points, images, epsilon)
    change = (levels.int() - images.int()).abs().max()
    assert change == int(epsilon * 255 + 1e-6)
    assert change / 255 <= epsilon + 1e-6


# ---- registry


def test_only_the_brew_has_several_targets() -> None:
    assert {
        name: trials_per_rate(case.settings)
        for name, case in ATTACK_CASES.items()
        if trials_per_rate(case.settings) > 1
    } == {"witches-brew": 2}


def test_attacks_that_need_a_proxy() -> None:
    needing = {name for name, case in ATTACK_CASES.items() if proxy_baselines(case.settings) == ("standard",)}
    assert needing == {"label-consistent", "witches-brew", "error-maximising"}
    assert all(proxy_baselines(case.settings) == () for name, case in ATTACK_CASES.items() if name not in needing)


@pytest.mark.parametrize("name", ["badnets", "blended", "label-consistent", "label-flip-targeted"])
def test_another_class_can_be_aimed_at(name: str) -> None:
    aimed = with_target(ATTACK_CASES[name].settings, 2)
    assert aimed == ATTACK_CASES[name].settings.model_copy(update={"target": 2})


@pytest.mark.parametrize("name", ["label-flip-random", "label-flip-pair", "witches-brew", "unlearnable"])
def test_attacks_without_a_target_take_none(name: str) -> None:
    kind = ATTACK_CASES[name].settings.kind
    with pytest.raises(UserError, match=f"^--target: {kind} has no target class$"):
        with_target(ATTACK_CASES[name].settings, 2)


# ---- errors


def test_source_and_target_must_differ() -> None:
    with pytest.raises(ValidationError, match=r"source and target are both class 3, so nothing would be flipped"):
        TargetedFlip(kind="label-flip-targeted", source=3, target=3)
    with pytest.raises(UserError, match=r"^--target: source and target are both class 1"):
        with_target(ATTACK_CASES["label-flip-targeted"].settings, 1)


REFUSALS: dict[str, tuple[str, float, dict[str, Any], str]] = {
    "not one image of the set": (
        "badnets",
        0.01,
        {},
        "rate 0.01 of 48 images (the training set) rounds to zero images",
    ),
    "not one of the class": ("label-consistent", 0.04, {}, "rate 0.04 of 12 images (class 2) rounds to zero images"),
    "not one to flip": (
        "label-flip-random",
        0.001,
        {},
        "rate 0.001 of 48 images (the training set) rounds to zero images",
    ),
    "more than the others": ("badnets", 0.95, {}, "46 images should be poisoned, but every class but 0 holds only 36"),
    "more than blended": ("blended", 0.8, {}, "38 images should be poisoned, but every class but 0 holds only 36"),
    "more than the class": ("witches-brew", 0.5, {}, "24 images should be poisoned, but class "),
    "no such target": ("badnets", 0.1, {"target": 4}, "class 4 does not exist; the classes are 0 to 3"),
    "no such source": ("label-flip-targeted", 0.5, {"source": 9}, "class 9 does not exist; the classes are 0 to 3"),
    "no such flip": ("label-flip-targeted", 0.5, {"target": 9}, "class 9 does not exist; the classes are 0 to 3"),
    "no such class": ("label-consistent", 0.5, {"target": 7}, "class 7 does not exist; the classes are 0 to 3"),
    "a large patch": ("badnets", 0.1, {"size": 9}, "a trigger of 9 x 9 pixels is larger than the images, 8 x 8"),
    "a large mark": (
        "label-consistent",
        0.5,
        {"size": 9},
        "a trigger of 9 x 9 pixels is larger than the images, 8 x 8",
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_invalid_settings_are_refused_with_a_message(why: str) -> None:
    name, rate, changes, expected = REFUSALS[why]
    with pytest.raises(UserError) as caught:
        make(name, rate=rate, **changes)
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["badnets", "blended", "label-consistent", "label-flip-targeted"])
def test_a_class_without_images_is_refused(name: str) -> None:
    clean, case = make_split(), ATTACK_CASES[name]
    empty = {"label-flip-targeted": 1}.get(name, getattr(case.settings, "target", 0))
    kept = clean.labels != empty
    clean = Split(clean.images[kept], clean.labels[kept], clean.index[kept])
    with pytest.raises(UserError, match=f"^class {empty} has no training images$"):
        poison(clean, generator(0), case.settings, case.rate, StubContext())


# ---- on disk


ABOUT = PoisonedSetInfo(attack="badnets", rate=0.25, of="?", available=1, goal=Goal(), added=3, trial=0)


def save(path: Path, made: PoisonedSet) -> str:
    about = ABOUT.model_copy(update={"of": made.rate_of, "available": made.available, "goal": made.goal})
    return poisoned_set.save(path, made, about, params={"rate": 0.25}, dataset="d" * 64, seed=3, seconds=1.0)


@NAMES
def test_a_poisoned_set_survives_the_disk(tmp_path: Path, name: str) -> None:
    made = make(name)
    sha256 = save(tmp_path / "set.safetensors", made)
    assert equal(poisoned_set.load(tmp_path / "set.safetensors"), made)
    header = artifacts.load(tmp_path / "set.safetensors", poisoned_set.KIND).header
    assert (header.sha256, header.seed, header.inputs) == (sha256, 3, {"dataset": "d" * 64})


def test_equal_sets_are_equal_files_and_others_have_other_hashes(tmp_path: Path) -> None:
    hashes = [save(tmp_path / f"{number}.safetensors", make("badnets", seed)) for number, seed in enumerate((0, 0, 1))]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert hashes[0] == hashes[1] != hashes[2]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, drop: str = "", kind: str = poisoned_set.KIND, **about: object) -> None:
    """The same artifact without a tensor, of another kind, or with another description; its checksums are right."""
    old = artifacts.load(path)
    tensors = {name: tensor for name, tensor in old.tensors.items() if name != drop}
    content = {**old.header.about, **about}
    artifacts.save(path, kind, tensors, about=content, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "no such file"),
        (truncate, "not a safetensors file, or a truncated one"),
        (alter, "content does not match its checksum"),
        (lambda path: rewrite(path, drop="rows"), "has no tensor 'rows'; build it again"),
        (lambda path: rewrite(path, drop="true_labels"), "has no tensor 'true_labels'; build it again"),
        (lambda path: rewrite(path, drop="pattern"), "has no tensor 'pattern'; build it again"),
        (lambda path: rewrite(path, kind="dataset"), "holds a dataset, but a poisoned-set is needed here"),
        (lambda path: rewrite(path, colour="red"), "header: colour: is not a known key"),
        (lambda path: rewrite(path, goal={"target": "x"}), "header: goal.target: "),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    path = tmp_path / "set.safetensors"
    save(path, make("badnets"))
    damage(path)
    with pytest.raises(UserError) as caught:
        poisoned_set.load(path)
    assert str(caught.value).startswith(f"{path}: {expected}")


# ---- the preview image


@pytest.mark.parametrize("channels", [1, 3])
def test_the_preview_has_three_rows_of_eight(channels: int, tmp_path: Path) -> None:
    from PIL import Image

    clean = torch.full((20, channels, 8, 8), 100, dtype=torch.uint8)
    trigger = Trigger(torch.zeros(channels, 8, 8), torch.zeros(channels, 8, 8, dtype=torch.uint8))
    trigger.opacity[:, 0, 0] = 1
    (tmp_path / "picture.png").write_bytes(example_grid(clean, trigger.stamp(clean)))
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture.shape == (3 * 68, 8 * 68, 3)
    corners = [picture[row * 68 + 3, 3].tolist() for row in range(3)]
    assert corners == [[100] * 3, [0] * 3, [0] * 3]  # the difference is stretched to the full range
    assert picture[2 * 68 + 40, 40].tolist() == [128] * 3  # no difference is grey


def test_a_preview_of_few_images_and_of_no_difference() -> None:
    clean = make_split().images[:2]
    assert example_grid(clean, clean).startswith(b"\x89PNG")

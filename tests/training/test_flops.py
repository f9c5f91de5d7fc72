"""What training costs: operations counted by hand on small networks, and budgets that are met.

Shapes: B batch, N images, C channel, H/W pixels.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import EPSILON, FACTS, JOINT, RECIPE
from torch import Tensor, nn

from advmoe.attacks.engine import PassCount
from advmoe.attacks.pgd import Pgd
from advmoe.core.artifacts import Header
from advmoe.core.errors import UserError
from advmoe.data.dataset import Dataset, DatasetInfo, Split
from advmoe.models import classifiers, inference
from advmoe.models.classifiers import (
    Architecture,
    BackboneKind,
    BackboneSettings,
    Classifier,
    ClassifierMetadata,
    MixtureArchitecture,
    PlainArchitecture,
)
from advmoe.models.mixture import MixtureOfExperts
from advmoe.models.resnet import ResNet18
from advmoe.runtime.machine import generator
from advmoe.training import crafting, flops, trainer, validation
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import (
    EqualPassesNetwork,
    HardRouting,
    LastLayers,
    MixtureBaseline,
    SingleNetwork,
    Synergy,
    UniformAverage,
)
from advmoe.training.batch_attacks import (
    Adversary,
    BatchAttack,
    CleanBatches,
    FgsmBatches,
    MixedBatches,
    PgdBatches,
    TradesBatches,
    draw_attack,
    expected_passes,
)
from advmoe.training.config import ValidatedTrainingConfig, Validation
from advmoe.training.flops import FlopsPerImage, HasLoss, TrainingCost, count_parameters, measure_flops
from advmoe.training.job import TrainingJob, TrainingResult
from advmoe.training.joint import JointConfig, JointRun, paper_design, train_mixture
from advmoe.training.single import NetworkSpec, PlainTask, SingleConfig, SingleRun, TradesTask, task_for, train_single
from advmoe.training.trainer import fit

COLOUR = DatasetInfo(channels=3, height=32, width=32, class_names=tuple("abcdefghij"), mean=(0.5,) * 3, std=(0.25,) * 3)
BACKBONE = BackboneSettings(kind="cnn", width=3)
CLEAN = CleanBatches(kind="clean")
FGSM = FgsmBatches(kind="fgsm", epsilons=(0.01, 0.02))
PGD = PgdBatches(kind="pgd", steps=(3,), step_size=0.5)
TRADES = TradesBatches(kind="trades", steps=(3,), step_size=0.5, beta=1.0)
MIXED = MixedBatches(kind="mixed", weights=(1, 2, 5), of=(CLEAN, FGSM, PGD))
IMAGES = 40
WATCHED = Validation(steps=2, step_size=0.5, gap=0.2, images=9)


def stream(*parts: object) -> torch.Generator:
    return generator("test_cost", *parts)


def make_split(count: int, name: str) -> Split:
    numbers = torch.arange(count)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=stream("images", name))
    return Split(images.to(torch.uint8), numbers % 3, numbers)


DATA = Dataset({"train": make_split(IMAGES, "train"), "validation": make_split(9, "validation")}, FACTS, "0" * 64)
PIXELS, LABELS = DATA["train"].pixels(), DATA["train"].labels


def single_recipe(**changes: Any) -> SingleConfig:
    return SingleConfig(validation_epsilon=EPSILON, **RECIPE | {"validation": WATCHED} | changes)


def joint_recipe(**changes: Any) -> JointConfig:
    return JointConfig(**RECIPE | JOINT | {"adversary": PGD, "validation": WATCHED} | changes)


def build(architecture: Architecture, facts: DatasetInfo = FACTS) -> nn.Module:
    return classifiers.build(architecture, facts, 0)


def plain(width: int = 3, kind: BackboneKind = "cnn") -> PlainArchitecture:
    return PlainArchitecture(kind="plain", backbone=BackboneSettings(kind=kind, width=width))


def cnn(width: int = 3) -> nn.Module:
    return build(plain(width))


def plain_learner(width: int = 3) -> PlainTask:
    return PlainTask(cnn(width), single_recipe())


# ---- operations of one image, by hand

LAYERS = ["first", "second", "third", "last"]


def by_hand(width: int) -> dict[str, int]:
    """Twice the multiplications of a SmallCnn's layers on 8x8 grey images: 8x8, 4x4 and 2x2 places, then 3 classes."""
    return {
        "first": 2 * 64 * width * 9 * 1,
        "second": 2 * 16 * (2 * width) * 9 * width,
        "third": 2 * 4 * (4 * width) * 9 * (2 * width),
        "last": 2 * (4 * width) * 3,
    }


@pytest.mark.parametrize("width", [1, 3, 8])
def test_rates_of_a_small_network_are_those_worked_out_by_hand(width: int) -> None:
    layers = by_hand(width)
    forward = sum(layers.values())
    found = measure_flops(plain_learner(width), PIXELS, LABELS)
    assert found.forward == forward
    assert found.pixels == forward  # back through every layer once, the weights are not asked
    assert found.learning == 3 * forward - layers["first"]  # forwards, to the weights, and back to the first layer


def test_a_resnet_on_digits_counts_as_convolutions_whatever_attacks_make_of_its_small_maps() -> None:
    """On a CPU they run as matrices, on a GPU not: equal training must be equal on both."""
    network = ResNet18(channels=1, classes=3, width=4, mean=(0.5,), std=(0.25,))
    places: dict[nn.Conv2d, int] = {}
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda conv, _, out: places.update({conv: out.shape[2] * out.shape[3]}))
    network(PIXELS)
    assert {1, 4} <= set(places.values())
    by_layer = [2 * places[conv] * conv.weight.numel() for conv in places]
    found = measure_flops(PlainTask(network, single_recipe()), PIXELS, LABELS)
    assert found.forward == sum(by_layer) + 2 * network.classify.weight.numel()


def test_trades_learns_from_two_passes() -> None:
    once = measure_flops(plain_learner(), PIXELS, LABELS)
    twice = measure_flops(TradesTask(cnn(), single_recipe(), beta=1.0), PIXELS, LABELS)
    assert (twice.forward, twice.pixels, twice.learning) == (once.forward, once.pixels, 2 * once.learning)


OTHERS: dict[str, MixtureBaseline] = {
    "uniform": UniformAverage(kind="uniform"),
    "more": LastLayers(kind="more"),
    "top1": HardRouting(kind="top1"),
    "soe": Synergy(kind="soe", temperature=1.0),
}


def learner_of_mixture(name: str | None, **changes: Any) -> Any:
    recipe = joint_recipe(**changes)
    design = specs.mixture_design(OTHERS[name], recipe) if name else paper_design(recipe)
    architecture = MixtureArchitecture(
        kind="mixture", backbone=BACKBONE, experts=recipe.experts, gate=design.gate, mixing=design.mixing
    )
    mixture = build(architecture)
    assert isinstance(mixture, MixtureOfExperts)
    return design.make_task(mixture, recipe)


GATE = {"first": 2 * 64 * 2 * 9, "second": 2 * 16 * 4 * 9 * 2, "third": 2 * 4 * 8 * 9 * 4, "last": 2 * 8 * 2}


@pytest.mark.parametrize(
    ("name", "beside", "first"),
    [
        (None, sum(GATE.values()), GATE["first"]),
        ("uniform", 0, 0),
        ("soe", 2 * 2 * 12, 0),  # a head of 12 features for each of the two
    ],
)
def test_rates_of_mixtures_are_those_worked_out_by_hand(name: str | None, beside: int, first: int) -> None:
    layers = by_hand(3)
    forward = 2 * sum(layers.values()) + beside
    found = measure_flops(learner_of_mixture(name), PIXELS, LABELS)
    assert (found.forward, found.pixels) == (forward, forward)
    assert found.learning == 3 * forward - 2 * layers["first"] - first


def test_frozen_experts_are_not_learned_from() -> None:
    """MoRE: gate in full; of the experts a forward pass and the gradient of the last layer's weights."""
    experts, gate = 2 * sum(by_hand(3).values()), sum(GATE.values())
    found = measure_flops(learner_of_mixture("more"), PIXELS, LABELS)
    assert found.forward == experts + gate
    assert found.learning == experts + 2 * by_hand(3)["last"] + 3 * gate - GATE["first"]


def test_turns_are_counted_both_and_averaged() -> None:
    experts, gate = 2 * sum(by_hand(3).values()), sum(GATE.values())
    of_gate = experts + 3 * gate - GATE["first"]
    of_experts = gate + 3 * experts - 2 * by_hand(3)["first"]
    assert measure_flops(learner_of_mixture("top1"), PIXELS, LABELS).learning == (of_gate + of_experts) // 2


@pytest.mark.parametrize("name", [None, *OTHERS])
def test_computing_activations_again_is_not_learning(name: str | None) -> None:
    """Or equal training would depend on how much memory there was."""
    lean = learner_of_mixture(name, checkpointing=True)
    assert measure_flops(lean, PIXELS, LABELS) == measure_flops(learner_of_mixture(name), PIXELS, LABELS)
    assert lean.mixture.checkpointing


# ---- counting leaves no trace


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [None, *OTHERS])
def test_counting_leaves_a_mixtures_learner_as_it_was(name: str | None) -> None:
    task = learner_of_mixture(name)
    before, modes = state(task.model), [module.training for module in task.model.modules()]
    learning = [parameter.requires_grad for parameter in task.model.parameters()]
    own = {key: copy.deepcopy(value) for key, value in vars(task).items() if isinstance(value, int | list)}
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    measure_flops(task, PIXELS, LABELS)
    assert torch.equal(torch.rand(2), drawn)
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.state_dict().items())
    assert [module.training for module in task.model.modules()] == modes
    assert [parameter.requires_grad for parameter in task.model.parameters()] == learning
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert {key: vars(task)[key] for key in own} == own


def train_one(adversary: Adversary, **changes: Any) -> TrainingResult:
    meets = not isinstance(adversary, CleanBatches | FgsmBatches)
    student = NetworkSpec(adversary=adversary, seed=0)
    recipe, radius = single_recipe(**changes), EPSILON if meets else None
    return train_single(SingleRun("tiny", student, BACKBONE, DATA, recipe, seed=0, epsilon=radius))


def train_joint(name: str | None = None, prior_flops: int = 0, **changes: Any) -> TrainingResult:
    recipe = joint_recipe(**changes)
    design = specs.mixture_design(OTHERS[name], recipe) if name else None
    experts = [classifiers.build(plain(), FACTS, seed) for seed in (1, 2)]
    trained, _ = train_mixture(
        JointRun(experts, BACKBONE, DATA, recipe, 0, EPSILON, name="tiny", design=design, prior_flops=prior_flops)
    )
    return trained


@pytest.mark.parametrize("name", [None, *OTHERS])
def test_training_is_the_same_whether_or_not_anybody_counts(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    counted = train_joint(name, epochs=1)
    monkeypatch.setattr(trainer, "measure_flops", lambda *_: FlopsPerImage(1, 1, 1))
    blind = train_joint(name, epochs=1)
    tensors = blind.model.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in counted.model.state_dict().items())
    assert counted.history == blind.history
    assert counted.cost.training_flops > blind.cost.training_flops


# ---- the record


def test_cost_is_a_sum_of_products() -> None:
    found = flops.training_cost(
        nn.Linear(3, 2),
        FlopsPerImage(forward=10, pixels=20, learning=50),
        PassCount(7, 5),
        images_learned=3,
        prior=1000,
    )
    assert found == TrainingCost(8, 10, 7, 5, 3, 7 * 10 + 5 * 20 + 3 * 50, 1000 + 320)
    assert list(found.as_dict()) == [
        "parameters",
        "flops_per_image",
        "crafting_forward",
        "crafting_backward",
        "learning",
        "training_flops",
        "total_training_flops",
    ]


@pytest.mark.parametrize(
    ("adversary", "forward", "backward"),
    [(CLEAN, 0, 0), (FGSM, 1, 1), (PGD, 3, 3), (TRADES, 4, 3)],
    ids=["clean", "fgsm", "pgd", "trades"],
)
def test_work_of_a_run_is_what_its_recipe_says(adversary: Adversary, forward: int, backward: int) -> None:
    """Every image once an epoch, in every pass of the attack; validation is not training."""
    found = train_one(adversary, epochs=3).cost
    assert found.learning == 3 * IMAGES
    assert (found.crafting_forward, found.crafting_backward) == (3 * IMAGES * forward, 3 * IMAGES * backward)
    layers = by_hand(3)
    each, passes = sum(layers.values()), 2 if adversary is TRADES else 1
    assert found.flops_per_image == each
    learning = passes * (3 * each - layers["first"])
    assert found.training_flops == 3 * IMAGES * ((forward + backward) * each + learning)
    assert found.total_training_flops == found.training_flops
    assert found.parameters == count_parameters(cnn())


def test_work_follows_the_steps_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def watched(*args: Any) -> BatchAttack | None:
        drawn = draw_attack(*args)
        assert drawn is not None
        assert isinstance(drawn.settings, Pgd)
        steps.append(drawn.settings.steps)
        return drawn

    monkeypatch.setattr(crafting, "draw_attack", watched)
    found = train_one(PgdBatches(kind="pgd", steps=(1, 2, 5), step_size=0.5), epochs=2).cost
    assert len(set(steps)) > 1
    assert found.crafting_forward == found.crafting_backward == 8 * sum(steps)  # five batches of eight an epoch


def test_parameters_are_those_that_training_may_choose() -> None:
    """9w + 18w^2 + 72w^2 weights, two numbers a BatchNorm channel, a last layer; no statistics."""
    assert count_parameters(cnn(3)) == 9 * 3 + 18 * 9 + 72 * 9 + 2 * 7 * 3 + 12 * 3 + 3


def test_a_mixture_pays_for_its_experts_too() -> None:
    alone, built_on = train_joint(epochs=1).cost, train_joint(epochs=1, prior_flops=12345).cost
    assert alone.total_training_flops == alone.training_flops
    assert built_on.training_flops == alone.training_flops
    assert built_on.total_training_flops == alone.training_flops + 12345


def test_equal_runs_cost_the_same_and_other_runs_do_not() -> None:
    assert train_one(MIXED).cost == train_one(MIXED).cost
    assert train_one(PGD).cost != train_one(PGD, epochs=1).cost


def classifier(metrics: dict[str, Any]) -> Classifier:
    header = Header(
        kind="classifier", about={}, params={}, inputs={}, seed=0, torch="2", metrics=metrics, sha256="0" * 64
    )
    return Classifier(cnn(), ClassifierMetadata(architecture=plain(), facts=FACTS), header)


def test_what_was_spent_on_all_experts_is_added_up() -> None:
    found = {name: classifier({"cost": {"total_training_flops": count}}) for name, count in (("a", 3), ("b", 40))}
    assert flops.total_prior_flops(found) == 43
    assert flops.total_prior_flops({}) == 0


@pytest.mark.parametrize("metrics", [{}, {"cost": None}, {"cost": {}}, {"cost": {"total_training_flops": "much"}}])
def test_an_expert_that_does_not_say_what_it_cost_is_named(metrics: dict[str, Any]) -> None:
    known = classifier({"cost": {"total_training_flops": 3}})
    with pytest.raises(UserError, match=r"^\S*pgd-1\S*: does not hold its training cost; run `dvc repro` ") as caught:
        flops.total_prior_flops({"clean": known, "pgd-1": classifier(metrics)})
    assert "\n" not in str(caught.value)


# ---- budgets: as many parameters


def the_mixture(width: int, experts: int, kind: BackboneKind) -> MixtureArchitecture:
    recipe = joint_recipe(experts=tuple(f"expert-{number}" for number in range(experts)))
    return specs.paper_mixture(BackboneSettings(kind=kind, width=width), recipe)


def size(architecture: Architecture, facts: DatasetInfo) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(architecture, facts).parameters())


WIDE: list[tuple[BackboneKind, BackboneKind, int, int, DatasetInfo]] = [
    *(("cnn", "cnn", width, experts, FACTS) for width, experts in ((1, 1), (2, 3), (5, 2), (8, 9), (64, 9))),
    *(("resnet18", "resnet18", width, 9, facts) for width in (4, 16) for facts in (FACTS, COLOUR)),
    ("cnn", "resnet18", 4, 9, FACTS),
    ("resnet50", "resnet18", 4, 9, FACTS),
    ("wideresnet28", "resnet18", 4, 3, COLOUR),
]


@pytest.mark.parametrize(("kind", "of", "width", "experts", "facts"), WIDE)
def test_widened_comes_nearest(
    kind: BackboneKind, of: BackboneKind, width: int, experts: int, facts: DatasetInfo
) -> None:
    mixture = the_mixture(width, experts, of)
    target = size(mixture, facts)
    found = specs.match_parameters(kind, mixture, facts)
    assert found.kind == kind

    def distance(wide: int) -> int:
        return abs(size(plain(wide, kind), facts) - target)

    assert distance(found.width) <= distance(found.width + 1)
    assert found.width == 1 or distance(found.width) <= distance(found.width - 1)


def test_widened_resnet18_is_about_three_times_as_wide_as_nine_experts() -> None:
    """Parameters grow with the square of the width."""
    found = specs.match_parameters("resnet18", the_mixture(16, 9, "resnet18"), FACTS)
    assert found.width == pytest.approx(48, abs=1)


def test_a_mixture_smaller_than_any_other_backbone_is_met_by_the_narrowest() -> None:
    assert specs.match_parameters("resnet50", the_mixture(1, 1, "cnn"), FACTS).width == 1


# ---- budgets: as much work


def student(adversary: Adversary = PGD, kind: BackboneKind = "cnn") -> SingleNetwork:
    return EqualPassesNetwork.model_validate(
        {"kind": "equal-passes", "backbone": kind, "seed": 0, "adversary": adversary.model_dump()}
    )


TWO_STEPS = PgdBatches(kind="pgd", steps=(2,), step_size=0.5)
BUDGETS: dict[str, tuple[SingleNetwork, JointConfig, int]] = {
    "same attack": (student(), joint_recipe(), 0),
    "experts cost too": (student(), joint_recipe(), 10**8),
    "shorter attack": (student(TWO_STEPS), joint_recipe(epochs=3), 10**7),
    "clean against attacked": (student(CLEAN), joint_recipe(), 3 * 10**7),
    "one step": (student(FGSM), joint_recipe(adversary=TWO_STEPS), 10**7),
    "trades": (student(TRADES), joint_recipe(), 10**8),
    "another backbone": (student(kind="resnet18"), joint_recipe(), 5 * 10**8),
    "perturbed weights": (student(), joint_recipe(awp=0.01), 10**7),
}


def job(recipe: ValidatedTrainingConfig, adversary: Adversary) -> TrainingJob:
    return TrainingJob("tiny", 0, DATA, recipe, adversary, EPSILON, "pgd")


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long runs of tiny networks; validation does not count and would take longer than training."""
    monkeypatch.setattr(
        validation, "validate", lambda *_: ({"clean": 0.5, "fgsm": 0.5, "pgd": 0.5}, PIXELS[:2], PIXELS[:2])
    )


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(("wanted", "joint", "prior_flops"), BUDGETS.values(), ids=BUDGETS.keys())
def test_a_lengthened_run_takes_the_mixtures_work_to_half_an_epoch(
    wanted: SingleNetwork, joint: JointConfig, prior_flops: int
) -> None:
    """Both are trained for real, and what they are found to have cost is compared."""
    assert joint.adversary in (PGD, TWO_STEPS)  # nothing is drawn: what is expected on average is what happens
    own: dict[str, Any] = {"epochs": joint.epochs, "adversary": joint.adversary, "awp": joint.awp}
    target = train_joint(prior_flops=prior_flops, **own).cost.total_training_flops
    recipe = specs.match_flops(single_recipe(), wanted, BACKBONE, joint, prior_flops, DATA)
    model = build(specs.plain_architecture(wanted, BACKBONE))
    short = recipe.model_copy(update={"epochs": 1})
    epoch = fit(task_for(wanted, model, short), job(short, wanted.adversary)).cost.training_flops
    assert abs(recipe.epochs * epoch - target) <= epoch / 2
    assert recipe.epochs > 1
    assert recipe.model_dump(exclude={"epochs"}) == single_recipe().model_dump(exclude={"epochs"})


def test_nobody_is_trained_for_less_than_one_epoch() -> None:
    wide = student(PgdBatches(kind="pgd", steps=(50,), step_size=0.5), "resnet18")
    cheap = joint_recipe(epochs=1, adversary=CLEAN)
    assert specs.match_flops(single_recipe(), wide, BACKBONE, cheap, 0, DATA).epochs == 1


def test_more_data_does_not_change_how_long_is_as_long() -> None:
    """Both go through the same images."""
    twice = replace(DATA, splits={**DATA.splits, "train": make_split(2 * IMAGES, "more")})
    found = [specs.match_flops(single_recipe(), student(), BACKBONE, joint_recipe(), 0, data) for data in (DATA, twice)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("adversary", "expected"),
    [
        (CLEAN, 0.0),
        (FGSM, 1.0),
        (PgdBatches(kind="pgd", steps=(5, 10, 30), step_size=0.5), 15.0),
        (MIXED, (0 * 1 + 1 * 2 + 3 * 5) / 8),
    ],
    ids=["clean", "fgsm", "pgd", "mixed"],
)
def test_expected_passes_are_the_mean_over_the_draws(adversary: Adversary, expected: float) -> None:
    assert expected_passes(adversary) == pytest.approx(expected)


def test_counting_is_the_same_in_any_number_of_images() -> None:
    task: HasLoss = plain_learner()
    assert measure_flops(task, PIXELS[:2], LABELS[:2]) == measure_flops(task, PIXELS, LABELS)
    assert inference.predict(task.model, PIXELS, IMAGES).shape == (IMAGES, 3)

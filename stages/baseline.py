"""baseline@NAME: what the mixture is compared with, a plain network, one that learned from it, or a mixture of others.

Reads `seed`, `model`, `pretrain`, `baseline.NAME`, the data set and, as that entry says, `epsilon`, `train` or only its
epochs, and the pre-trained experts or the mixture. Writes artifacts/baseline/NAME.safetensors,
metrics/baseline/NAME.json and plots/baseline/NAME.csv.
"""

from advmoe import classifiers, paths
from advmoe.classifiers import Backbone
from advmoe.data import dataset
from advmoe.data.dataset import Dataset
from advmoe.params import Epsilon, PositiveInt, Seed, load_section
from advmoe.training import comparators, cost, joint
from advmoe.training.comparators import Distilled, OfExperts, SingleNetwork
from advmoe.training.experts import load_experts, trained_on
from advmoe.training.joint import JointRecipe
from advmoe.training.single import SingleRecipe, baseline_recipe, train_and_record

STAGE = "baseline"


def run(name: str) -> None:
    """Train the comparator called `name` in params.yaml."""
    comparator, data = comparators.load(f"{STAGE}.{name}"), dataset.load(paths.DATASET)
    if isinstance(comparator, SingleNetwork):
        _train_single(name, comparator, data)
    elif isinstance(comparator, Distilled):
        _distil(name, comparator, data)
    else:
        _train_mixture(name, comparator, data)


def _train_single(name: str, student: SingleNetwork, data: Dataset) -> None:
    seed, backbone = load_section("seed", Seed), load_section("model", Backbone)
    epsilon = load_section("epsilon", Epsilon) if student.meets_threat_model else None
    recipe = baseline_recipe(load_section("pretrain", SingleRecipe), load_section("train.epochs", PositiveInt))
    own = comparators.plain(student, backbone).backbone
    if student.match == "parameters":
        own = comparators.widened(
            student.backbone, comparators.the_mixture(backbone, load_section("train", JointRecipe)), data.facts
        )
    elif student.match == "passes":
        matched = load_section("train", JointRecipe)
        spent = cost.spent(load_experts(matched.experts, data))
        recipe = comparators.lengthened(recipe, student, backbone, matched, spent, data)
    train_and_record(STAGE, name, f"baseline-{name}", student, own, data, recipe, seed=seed, epsilon=epsilon)


def _distil(name: str, student: Distilled, data: Dataset) -> None:
    epsilon = load_section("epsilon", Epsilon) if student.meets_threat_model else None
    teacher = classifiers.load(paths.MIXTURE)
    trained_on(teacher, paths.MIXTURE, data)
    train_and_record(
        STAGE,
        name,
        f"baseline-{name}",
        student,
        comparators.plain(student, load_section("model", Backbone)).backbone,
        data,
        baseline_recipe(load_section("pretrain", SingleRecipe), load_section("train.epochs", PositiveInt)),
        seed=load_section("seed", Seed),
        epsilon=epsilon,
        learner=lambda _, model, recipe: student.learner(teacher.model, model, recipe),
        spent=cost.taken(paths.MIXTURE, teacher),
        made_from={"mixture": teacher.header.sha256},
    )


def _train_mixture(name: str, comparator: OfExperts, data: Dataset) -> None:
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    recipe = load_section("train", JointRecipe)
    joint.train_and_record(
        STAGE,
        name,
        f"baseline-{name}",
        recipe,
        data,
        seed=seed,
        epsilon=epsilon,
        design=comparators.design(comparator, recipe),
        settings={"comparator": comparator},
    )

"""baseline@NAME: what the mixture is compared with, a plain network, one that learned from it, or a mixture of others.

Reads `seed`, `model`, `pretrain`, `baseline.NAME`, the data set and, as that entry says, `epsilon`, `train` or only its
epochs, and the pre-trained experts or the mixture. Writes artifacts/baseline/NAME.safetensors,
metrics/baseline/NAME.json and plots/baseline/NAME.csv.
"""

from advmoe.core import paths
from advmoe.core.settings import Epsilon, PositiveInt, Seed, load_section
from advmoe.data import dataset
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import Backbone
from advmoe.training import flops, joint
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import DistilledNetwork, MixtureBaseline, SingleNetwork
from advmoe.training.joint import JointConfig
from advmoe.training.pretrained_experts import check_trained_on, load_experts
from advmoe.training.single import SingleConfig, baseline_recipe, train_and_record

STAGE = "baseline"


def run(name: str) -> None:
    """Train the comparator called `name` in params.yaml."""
    comparator, data = specs.load(f"{STAGE}.{name}"), dataset.load(paths.DATASET)
    if isinstance(comparator, SingleNetwork):
        _train_single(name, comparator, data)
    elif isinstance(comparator, DistilledNetwork):
        _distil(name, comparator, data)
    else:
        _train_mixture(name, comparator, data)


def _train_single(name: str, student: SingleNetwork, data: Dataset) -> None:
    seed, backbone = load_section("seed", Seed), load_section("model", Backbone)
    epsilon = load_section("epsilon", Epsilon) if student.meets_threat_model else None
    recipe = baseline_recipe(load_section("pretrain", SingleConfig), load_section("train.epochs", PositiveInt))
    own = specs.plain(student, backbone).backbone
    if student.match == "parameters":
        own = specs.match_parameters(
            student.backbone, specs.paper_mixture(backbone, load_section("train", JointConfig)), data.facts
        )
    elif student.match == "passes":
        matched = load_section("train", JointConfig)
        spent = flops.total_prior_flops(load_experts(matched.experts, data))
        recipe = specs.match_flops(recipe, student, backbone, matched, spent, data)
    train_and_record(STAGE, name, f"baseline-{name}", student, own, data, recipe, seed=seed, epsilon=epsilon)


def _distil(name: str, student: DistilledNetwork, data: Dataset) -> None:
    epsilon = load_section("epsilon", Epsilon) if student.meets_threat_model else None
    teacher = classifiers.load(paths.MIXTURE)
    check_trained_on(teacher, paths.MIXTURE, data)
    train_and_record(
        STAGE,
        name,
        f"baseline-{name}",
        student,
        specs.plain(student, load_section("model", Backbone)).backbone,
        data,
        baseline_recipe(load_section("pretrain", SingleConfig), load_section("train.epochs", PositiveInt)),
        seed=load_section("seed", Seed),
        epsilon=epsilon,
        learner=lambda _, model, recipe: student.learner(teacher.model, model, recipe),
        spent=flops.prior_flops(paths.MIXTURE, teacher),
        made_from={"mixture": teacher.header.sha256},
    )


def _train_mixture(name: str, comparator: MixtureBaseline, data: Dataset) -> None:
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    recipe = load_section("train", JointConfig)
    joint.train_and_record(
        STAGE,
        name,
        f"baseline-{name}",
        recipe,
        data,
        seed=seed,
        epsilon=epsilon,
        design=specs.design(comparator, recipe),
        settings={"comparator": comparator},
    )

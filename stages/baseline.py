"""baseline@NAME: one baseline: a plain network, a network distilled from the mixture, or a mixture by another method.

Reads `seed`, `model`, `pretrain`, `baseline.NAME`, the data set and, depending on the entry, `epsilon`, `train` or only
its epochs, and the pre-trained experts or the mixture. Writes artifacts/baseline/NAME.safetensors,
metrics/baseline/NAME.json and plots/baseline/NAME.csv.
"""

from dataclasses import replace

from advmoe.core import paths
from advmoe.core.settings import Epsilon, PositiveInt, Seed, load_section
from advmoe.data import dataset
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings
from advmoe.training import flops, joint
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import DistilledNetwork, MixtureBaseline, SingleNetwork
from advmoe.training.joint import JointConfig, pretrained_run
from advmoe.training.pretrained_experts import check_trained_on, load_experts
from advmoe.training.single import SingleConfig, SingleRun, baseline_config, train_and_save

STAGE = "baseline"


def run(name: str) -> None:
    """Trains the baseline `name` of params.yaml."""
    comparator, data = specs.load(f"{STAGE}.{name}"), dataset.load(paths.DATASET)
    if isinstance(comparator, SingleNetwork):
        _train_single(name, comparator, data)
    elif isinstance(comparator, DistilledNetwork):
        _distil(name, comparator, data)
    else:
        _train_mixture(name, comparator, data)


def _train_single(name: str, student: SingleNetwork, data: Dataset) -> None:
    seed, backbone = load_section("seed", Seed), load_section("model", BackboneSettings)
    epsilon = load_section("epsilon", Epsilon) if student.uses_threat_epsilon else None
    recipe = baseline_config(load_section("pretrain", SingleConfig), load_section("train.epochs", PositiveInt))
    own = specs.plain_architecture(student, backbone).backbone
    if student.match == "parameters":
        own = specs.match_parameters(
            student.backbone, specs.paper_mixture(backbone, load_section("train", JointConfig)), data.facts
        )
    elif student.match == "passes":
        matched = load_section("train", JointConfig)
        prior_flops = flops.total_prior_flops(load_experts(matched.experts, data))
        recipe = specs.match_flops(recipe, student, backbone, matched, prior_flops, data)
    train_and_save(STAGE, name, SingleRun(f"baseline-{name}", student, own, data, recipe, seed, epsilon))


def _distil(name: str, student: DistilledNetwork, data: Dataset) -> None:
    epsilon = load_section("epsilon", Epsilon) if student.uses_threat_epsilon else None
    teacher = classifiers.load(paths.MIXTURE)
    check_trained_on(teacher, paths.MIXTURE, data)
    run = SingleRun(
        f"baseline-{name}",
        student,
        specs.plain_architecture(student, load_section("model", BackboneSettings)).backbone,
        data,
        baseline_config(load_section("pretrain", SingleConfig), load_section("train.epochs", PositiveInt)),
        seed=load_section("seed", Seed),
        epsilon=epsilon,
        make_task=lambda _, model, config: student.task(teacher.model, model, config),
        prior_flops=flops.prior_flops(paths.MIXTURE, teacher),
        inputs={"mixture": teacher.header.sha256},
    )
    train_and_save(STAGE, name, run)


def _train_mixture(name: str, comparator: MixtureBaseline, data: Dataset) -> None:
    seed, epsilon = load_section("seed", Seed), load_section("epsilon", Epsilon)
    recipe = load_section("train", JointConfig)
    run = pretrained_run(data, recipe, seed=seed, epsilon=epsilon)
    run = replace(run, name=f"baseline-{name}", design=specs.mixture_design(comparator, recipe))
    joint.train_and_save(STAGE, name, run, settings={"comparator": comparator})

"""Training of victims and shadow models: the pipeline's networks, retrained on another training set.

A victim and its clean twin differ in the training images and labels only: recipe, seed, batch order and validation
images are the same. The validation split stays clean, as a defender is assumed to have a small trusted set. The channel
mean and standard deviation inside the networks are those of the clean set, too: poison hardly changes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from torch import nn

from advmoe.core import paths
from advmoe.core.settings import Epsilon, Seed, Settings, load_section
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, Classifier, MixtureArchitecture, PlainArchitecture
from advmoe.runtime.parallel import parallel_map
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import Baseline, SingleNetwork
from advmoe.training.job import TrainingResult
from advmoe.training.joint import JointConfig, JointRun, train_mixture
from advmoe.training.single import NetworkSpec, SingleConfig, SingleRun, baseline_config, train_single

MIXTURE, JOINT_ONLY = "mixture", "mixture-joint"


@dataclass(frozen=True)
class VictimRecipes:
    """All settings that the pipeline's training stages read from params.yaml.

    `seed_offset`: added to the project's seed, 0 for the pipeline's own networks; `checkpoint_dir`: folder of
    checkpoints, see `advmoe.runtime.checkpoints.workdir`.
    """

    seed: int
    epsilon: float
    backbone: BackboneSettings
    pretrain: SingleConfig
    experts: dict[str, NetworkSpec]
    joint: JointConfig
    baselines: dict[str, SingleNetwork]
    seed_offset: int = 0
    checkpoint_dir: Path | None = None

    @classmethod
    def from_params(cls) -> "VictimRecipes":
        """Reads params.yaml. Raises UserError for a missing or invalid setting."""
        return cls(
            seed=load_section("seed", Seed),
            epsilon=load_section("epsilon", Epsilon),
            backbone=load_section("model", BackboneSettings),
            pretrain=load_section("pretrain", SingleConfig),
            experts=load_section("experts", dict[str, NetworkSpec]),
            joint=load_section("train", JointConfig),
            baselines=retrainable_baselines(load_section("baseline", dict[str, Baseline])),
        )

    def with_seed_offset(self, seed_offset: int) -> "VictimRecipes":
        """Returns the same recipes with another seed offset."""
        return replace(self, seed_offset=seed_offset)

    @property
    def run_seed(self) -> int:
        """The project's seed plus the offset."""
        return self.seed + self.seed_offset

    @property
    def baseline_training(self) -> SingleConfig:
        """The training config of baselines, which train as long as expert and joint phase together."""
        return baseline_config(self.pretrain, self.joint.epochs)

    def backbone_for(self, spec: NetworkSpec) -> BackboneSettings:
        """Returns the backbone of an expert or a baseline."""
        if isinstance(spec, SingleNetwork):
            return specs.plain_architecture(spec, self.backbone).backbone
        return self.backbone

    def epsilon_for(self, spec: NetworkSpec) -> float | None:
        """Returns the threat model's epsilon, None for a network that is not trained under the threat model."""
        return self.epsilon if spec.uses_threat_epsilon else None

    def architecture(self, victim: str) -> PlainArchitecture | MixtureArchitecture:
        """Returns the architecture of a victim."""
        if not is_mixture(victim):
            return specs.plain_architecture(self.baselines[victim], self.backbone)
        return specs.paper_mixture(self.backbone, self.joint)


def retrainable_baselines(baselines: Mapping[str, Baseline]) -> dict[str, SingleNetwork]:
    """Returns the baselines that can be retrained from their recipe alone: plain networks without a matched budget."""
    return {
        name: single
        for name, single in baselines.items()
        if isinstance(single, SingleNetwork) and single.match == "nothing"
    }


@dataclass(frozen=True)
class VictimSpec:
    """One victim to train: its name, the recipes, and the training split (None: the clean one)."""

    victim: str
    recipes: VictimRecipes
    train: Split | None


def is_mixture(victim: str) -> bool:
    """Whether a victim is a mixture of experts."""
    return victim in {MIXTURE, JOINT_ONLY}


def train_victims(victims: Sequence[VictimSpec]) -> list[TrainingResult]:
    """Trains victims and returns their results in the same order; see `parallel_map` for parallelism."""
    singles = {position: _single_jobs(spec) for position, spec in enumerate(victims)}
    trained = iter(parallel_map(_train_single, [single for parts in singles.values() for single in parts]))
    results = {position: [next(trained) for _ in parts] for position, parts in singles.items()}
    mixtures = [position for position, spec in enumerate(victims) if is_mixture(spec.victim)]
    joint = [_JointJob(victims[position], [part.model for part in results[position]]) for position in mixtures]
    for position, mixture in zip(mixtures, parallel_map(_train_joint, joint), strict=True):
        results[position] = [mixture]
    return [parts[0] for parts in results.values()]


@dataclass(frozen=True)
class _SingleJob:
    """One plain network to train: a baseline, or an expert of a mixture."""

    name: str
    is_expert: bool
    recipes: VictimRecipes
    train: Split | None


@dataclass(frozen=True)
class _JointJob:
    """One joint phase to train, with its trained experts; without any, the pipeline's experts are used."""

    spec: VictimSpec
    experts: Sequence[nn.Module]


def _single_jobs(spec: VictimSpec) -> list[_SingleJob]:
    recipes = spec.recipes
    if not is_mixture(spec.victim):
        return [_SingleJob(spec.victim, False, recipes, spec.train)]
    if spec.victim == MIXTURE:
        return [_SingleJob(name, True, recipes, spec.train) for name in recipes.joint.experts]
    if _pipeline_experts(recipes) is not None:
        return []
    return [_SingleJob(name, True, recipes, None) for name in recipes.joint.experts]


def _train_single(single: _SingleJob) -> TrainingResult:
    recipes = single.recipes
    spec = (recipes.experts if single.is_expert else recipes.baselines)[single.name]
    run = SingleRun(
        single.name if single.is_expert else f"baseline-{single.name}",
        spec,
        recipes.backbone_for(spec),
        _dataset_with(single.train),
        recipes.pretrain if single.is_expert else recipes.baseline_training,
        seed=recipes.run_seed,
        epsilon=recipes.epsilon_for(spec),
        checkpoint_dir=recipes.checkpoint_dir,
    )
    return train_single(run)


def _train_joint(joint: _JointJob) -> TrainingResult:
    recipes = joint.spec.recipes
    experts = list(joint.experts) or [expert.model for expert in (_pipeline_experts(recipes) or {}).values()]
    assert experts
    run = JointRun(
        experts,
        recipes.backbone,
        _dataset_with(joint.spec.train),
        recipes.joint,
        seed=recipes.run_seed,
        epsilon=recipes.epsilon,
        checkpoint_dir=recipes.checkpoint_dir,
    )
    trained, _ = train_mixture(run)
    return trained


@lru_cache(maxsize=1)
def _clean_dataset() -> Dataset:
    return dataset.load(paths.DATASET)


def _dataset_with(train: Split | None) -> Dataset:
    clean = _clean_dataset()
    return clean if train is None else replace(clean, splits={**clean.splits, "train": train})


def train_proxy(baseline: str, recipes: VictimRecipes, proxy_seed: int) -> nn.Module:
    """Trains the attacker's proxy: a baseline's recipe on the clean set, with a seed that no victim has."""
    spec = recipes.baselines[baseline]
    run = SingleRun(
        f"proxy-{baseline}",
        spec.model_copy(update={"seed": proxy_seed}),
        recipes.backbone_for(spec),
        _clean_dataset(),
        recipes.baseline_training,
        seed=proxy_seed,
        epsilon=recipes.epsilon_for(spec),
        checkpoint_dir=recipes.checkpoint_dir,
    )
    return train_single(run).model


# ---- networks that the pipeline has trained


def matching_pipeline_model(victim: str, recipes: VictimRecipes) -> nn.Module | None:
    """Loads the pipeline's model as clean twin of a victim; None unless its seed, recipe and data are the same."""
    if not is_mixture(victim):
        expected = _expected_params(victim, recipes, is_expert=False)
        backbone = recipes.backbone_for(recipes.baselines[victim])
        return _model_or_none(_load_if_matching(paths.artifact("baseline", victim), expected, recipes, backbone))
    experts = _pipeline_experts(recipes)
    if experts is None:
        return None
    expected = {"recipe": recipes.joint.model_dump(mode="json"), "epsilon": recipes.epsilon}
    inputs = {f"expert {name}": expert.header.sha256 for name, expert in experts.items()}
    return _model_or_none(_load_if_matching(paths.MIXTURE, expected, recipes, recipes.backbone, inputs))


def _pipeline_experts(recipes: VictimRecipes) -> dict[str, Classifier] | None:
    """Loads the pre-trained experts in the gate's order; None unless seed, recipe and data of all are the same."""
    experts = {}
    for name in recipes.joint.experts:
        expected = _expected_params(name, recipes, is_expert=True)
        expert = _load_if_matching(paths.artifact("pretrain", name), expected, recipes, recipes.backbone)
        if expert is None:
            return None
        experts[name] = expert
    return experts


def _model_or_none(classifier: Classifier | None) -> nn.Module | None:
    return None if classifier is None else classifier.model


def _expected_params(name: str, recipes: VictimRecipes, *, is_expert: bool) -> dict[str, object]:
    recipe: Settings = recipes.pretrain if is_expert else recipes.baseline_training
    spec = (recipes.experts if is_expert else recipes.baselines)[name]
    settings = {"recipe": recipe, "student": spec}
    return {key: value.model_dump(mode="json") for key, value in settings.items()} | {
        "epsilon": recipes.epsilon_for(spec)
    }


def _load_if_matching(
    path: Path,
    params: dict[str, object],
    recipes: VictimRecipes,
    backbone: BackboneSettings,
    experts: Mapping[str, str] = MappingProxyType({}),
) -> Classifier | None:
    """Loads a classifier; None unless it was trained with these params, seed, data and (for a mixture) experts."""
    if not path.exists():
        return None
    classifier = classifiers.load(path)
    expected_inputs = {"dataset": _clean_dataset().sha256, **experts}
    same = classifier.header.params == params and classifier.header.seed == recipes.run_seed
    same = same and classifier.header.inputs == expected_inputs and classifier.about.architecture.backbone == backbone
    return classifier if same else None

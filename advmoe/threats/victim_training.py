"""The pipeline's own networks, trained anew on another training set by the pipeline's own code: victims and shadows.

A victim and its clean twin differ in the training images and labels and in nothing else: recipe, seed, order of batches
and validation images are the same. Validation stays clean: the defender is granted a small trusted set. So do the
channel statistics inside the networks, which a poisoned corner would hardly move.
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
from advmoe.models.classifiers import Backbone, Classifier, Mixture, Plain
from advmoe.runtime.parallel import parallel_map
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import Baseline, SingleNetwork
from advmoe.training.joint import JointConfig, train_mixture
from advmoe.training.single import NetworkSpec, SingleConfig, baseline_recipe, train_single
from advmoe.training.trainer import TrainingResult

MIXTURE, JOINT_ONLY = "mixture", "mixture-joint"


@dataclass(frozen=True)
class VictimRecipes:
    """All that the pipeline's training stages read from params.yaml; `added` to the seed, 0 is the pipeline's own.

    `shelf`: folder of checkpoints, see `advmoe.runtime.checkpoints.workdir`.
    """

    seed: int
    epsilon: float
    backbone: Backbone
    pretrain: SingleConfig
    experts: dict[str, NetworkSpec]
    joint: JointConfig
    baselines: dict[str, SingleNetwork]
    added: int = 0
    shelf: Path | None = None

    @classmethod
    def read(cls) -> "VictimRecipes":
        """Raises UserError for what is missing or wrong."""
        return cls(
            seed=load_section("seed", Seed),
            epsilon=load_section("epsilon", Epsilon),
            backbone=load_section("model", Backbone),
            pretrain=load_section("pretrain", SingleConfig),
            experts=load_section("experts", dict[str, NetworkSpec]),
            joint=load_section("train", JointConfig),
            baselines=retrainable(load_section("baseline", dict[str, Baseline])),
        )

    def under(self, added: int) -> "VictimRecipes":
        """The same recipes under another seed."""
        return replace(self, added=added)

    @property
    def run_seed(self) -> int:
        """The seed that takes the place of the project's."""
        return self.seed + self.added

    @property
    def for_baselines(self) -> SingleConfig:
        """The recipe of plain networks."""
        return baseline_recipe(self.pretrain, self.joint.epochs)

    def backbone_of(self, student: NetworkSpec) -> Backbone:
        """What kind of network an expert or a baseline is."""
        if isinstance(student, SingleNetwork):
            return specs.plain(student, self.backbone).backbone
        return self.backbone

    def met_by(self, student: NetworkSpec) -> float | None:
        """The threat model's epsilon, for a student that meets it."""
        return self.epsilon if student.meets_threat_model else None

    def architecture(self, victim: str) -> Plain | Mixture:
        """What kind of network a victim is."""
        if not is_mixture(victim):
            return specs.plain(self.baselines[victim], self.backbone)
        return specs.paper_mixture(self.backbone, self.joint)


def retrainable(baselines: Mapping[str, Baseline]) -> dict[str, SingleNetwork]:
    """Those that a study can train anew from a recipe alone: plain networks that match nobody's work."""
    return {
        name: single
        for name, single in baselines.items()
        if isinstance(single, SingleNetwork) and single.match == "nothing"
    }


@dataclass(frozen=True)
class VictimSpec:
    """One victim to train: whose name, under which recipes, on which training images (None: the clean ones)."""

    victim: str
    recipes: VictimRecipes
    train: Split | None


def is_mixture(victim: str) -> bool:
    """Whether a victim has experts and a gate."""
    return victim in {MIXTURE, JOINT_ONLY}


def train_victims(orders: Sequence[VictimSpec]) -> list[TrainingResult]:
    """Every ordered victim, in that order; two networks at a time where there are cores for it."""
    singles = {position: _singles(order) for position, order in enumerate(orders)}
    trained = iter(parallel_map(_train_single, [single for parts in singles.values() for single in parts]))
    found = {position: [next(trained) for _ in parts] for position, parts in singles.items()}
    mixtures = [position for position, order in enumerate(orders) if is_mixture(order.victim)]
    joint = [_Joint(orders[position], [part.model for part in found[position]]) for position in mixtures]
    for position, mixture in zip(mixtures, parallel_map(_train_joint, joint), strict=True):
        found[position] = [mixture]
    return [parts[0] for parts in found.values()]


@dataclass(frozen=True)
class _Single:
    """One plain network to train: a baseline, or an expert of a mixture."""

    name: str
    is_expert: bool
    recipes: VictimRecipes
    train: Split | None


@dataclass(frozen=True)
class _Joint:
    """Trained experts that wait for their joint phase; none: the pipeline's own."""

    order: VictimSpec
    experts: Sequence[nn.Module]


def _singles(order: VictimSpec) -> list[_Single]:
    recipes = order.recipes
    if not is_mixture(order.victim):
        return [_Single(order.victim, False, recipes, order.train)]
    if order.victim == MIXTURE:
        return [_Single(name, True, recipes, order.train) for name in recipes.joint.experts]
    if _pipeline_experts(recipes) is not None:
        return []
    return [_Single(name, True, recipes, None) for name in recipes.joint.experts]


def _train_single(single: _Single) -> TrainingResult:
    recipes = single.recipes
    student = (recipes.experts if single.is_expert else recipes.baselines)[single.name]
    return train_single(
        single.name if single.is_expert else f"baseline-{single.name}",
        student,
        recipes.backbone_of(student),
        _data(single.train),
        recipes.pretrain if single.is_expert else recipes.for_baselines,
        seed=recipes.run_seed,
        epsilon=recipes.met_by(student),
        shelf=recipes.shelf,
    )


def _train_joint(joint: _Joint) -> TrainingResult:
    recipes = joint.order.recipes
    experts = list(joint.experts) or [expert.model for expert in (_pipeline_experts(recipes) or {}).values()]
    assert experts
    trained, _ = train_mixture(
        experts,
        recipes.backbone,
        _data(joint.order.train),
        recipes.joint,
        seed=recipes.run_seed,
        epsilon=recipes.epsilon,
        shelf=recipes.shelf,
    )
    return trained


@lru_cache(maxsize=1)
def _clean() -> Dataset:
    return dataset.load(paths.DATASET)


def _data(train: Split | None) -> Dataset:
    clean = _clean()
    return clean if train is None else replace(clean, splits={**clean.splits, "train": train})


def train_proxy(baseline: str, recipes: VictimRecipes, proxy_seed: int) -> nn.Module:
    """The attacker's own network: that baseline's recipe on the clean set, but no victim's name, seed or start."""
    student = recipes.baselines[baseline]
    trained = train_single(
        f"proxy-{baseline}",
        student.model_copy(update={"seed": proxy_seed}),
        recipes.backbone_of(student),
        _clean(),
        recipes.for_baselines,
        seed=proxy_seed,
        epsilon=recipes.met_by(student),
        shelf=recipes.shelf,
    )
    return trained.model


# ---- the pipeline's own networks


def pipeline_twin(victim: str, recipes: VictimRecipes) -> nn.Module | None:
    """The pipeline's own model as a victim's clean twin; None unless it was made with this seed, recipe and data."""
    if not is_mixture(victim):
        wanted = _single_params(victim, recipes, is_expert=False)
        backbone = recipes.backbone_of(recipes.baselines[victim])
        return _model(_made_as(paths.artifact("baseline", victim), wanted, recipes, backbone))
    experts = _pipeline_experts(recipes)
    if experts is None:
        return None
    wanted = {"recipe": recipes.joint.model_dump(mode="json"), "epsilon": recipes.epsilon}
    inputs = {f"expert {name}": expert.header.sha256 for name, expert in experts.items()}
    return _model(_made_as(paths.MIXTURE, wanted, recipes, recipes.backbone, inputs))


def _pipeline_experts(recipes: VictimRecipes) -> dict[str, Classifier] | None:
    """The pre-trained experts in the gate's order, None unless all were made with this seed, recipe and data."""
    found = {}
    for name in recipes.joint.experts:
        wanted = _single_params(name, recipes, is_expert=True)
        expert = _made_as(paths.artifact("pretrain", name), wanted, recipes, recipes.backbone)
        if expert is None:
            return None
        found[name] = expert
    return found


def _model(found: Classifier | None) -> nn.Module | None:
    return None if found is None else found.model


def _single_params(name: str, recipes: VictimRecipes, *, is_expert: bool) -> dict[str, object]:
    recipe: Settings = recipes.pretrain if is_expert else recipes.for_baselines
    student = (recipes.experts if is_expert else recipes.baselines)[name]
    made = {"recipe": recipe, "student": student}
    return {key: value.model_dump(mode="json") for key, value in made.items()} | {"epsilon": recipes.met_by(student)}


def _made_as(
    path: Path,
    params: dict[str, object],
    recipes: VictimRecipes,
    backbone: Backbone,
    experts: Mapping[str, str] = MappingProxyType({}),
) -> Classifier | None:
    """The classifier in a file, None unless it was made with these params, seed, data and (a mixture) experts."""
    if not path.exists():
        return None
    found = classifiers.load(path)
    made_from = {"dataset": _clean().sha256, **experts}
    same = found.header.params == params and found.header.seed == recipes.run_seed
    same = same and found.header.inputs == made_from and found.about.architecture.backbone == backbone
    return found if same else None

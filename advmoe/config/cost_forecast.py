"""Forecast of the cost of training and evaluation: floating-point operations, and hours at a given or measured rate.

    operations = epochs * images * (passes * (forward + pixels) + gradients * learning)     training
               + epochs * validation images * ((1 + steps) * (forward + pixels) + 4 * forward)     validation
    hours      = operations / (operations per second) / 3600

`passes`: attack steps per image, on average over the draws; `gradients`: 1, or 2 where weights are perturbed;
`forward`, `pixels` and `learning`: operations per image, counted on the network (`advmoe.training.flops`). TRADES takes
one more forward pass per image. The forecast is an upper bound for MoRE, top-1 and Synergy-of-Experts, which freeze
parts of the network or skip a recipe's forward pass on clean images, and for evaluation, where it assumes that no
attack succeeds. The rate is given, or measured on a few training steps.

Training in poisoning, extraction and membership experiments is not included.

Shapes: B batch, C channel, H/W pixels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.attacks import registry
from advmoe.attacks.registry import AttackSettings
from advmoe.config.schema import Params
from advmoe.core import console, paths
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, DatasetInfo, Split
from advmoe.data.registry import PrepareSettings
from advmoe.data.sources.digits import Digits
from advmoe.data.sources.downloads import Download
from advmoe.evaluation.config import applicable_attacks
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import device, generator
from advmoe.training.baselines import specs
from advmoe.training.baselines.specs import DistilledNetwork, SingleNetwork
from advmoe.training.batch_attacks import Adversary, PgdBatches, expected_passes
from advmoe.training.config import ValidatedTrainingConfig
from advmoe.training.flops import SAMPLE_SIZE, FlopsPerImage, HasLoss, measure_flops
from advmoe.training.job import TrainingJob, TrainingTask
from advmoe.training.joint import JointConfig, MixtureTask
from advmoe.training.single import NetworkSpec, PlainTask, baseline_config, task_for
from advmoe.training.trainer import Trainer

# training images, test images (None: drawn from the training images), channels, side in pixels, classes
SourceSize = tuple[int, int | None, Literal[1, 3], int, int]
SOURCE_SIZES: dict[str, SourceSize] = {
    "digits": (1797, None, 1, 8, 10),
    "cifar10": (50_000, 10_000, 3, 32, 10),
    "cifar100": (50_000, 10_000, 3, 32, 100),
    "svhn": (73_257, 26_032, 3, 32, 10),
    "mnist": (60_000, 10_000, 1, 28, 10),
    "fashion-mnist": (60_000, 10_000, 1, 28, 10),
}
TIMED_ATTACK = PgdBatches(kind="pgd", steps=(3,), step_size=0.25)  # in the steps that are timed
MIN_STEP_SECONDS = 1.0  # shorter steps are too short to be timed
FIRST_BATCH_SIZE = 4  # images; doubled as long as the rate grows by MIN_SPEEDUP
MIN_SPEEDUP = 1.1
COLUMNS = ("stage", "passes", "PFLOP", "TFLOP/s", "hours")


@dataclass(frozen=True)
class Sizes:
    """Number of images of each split, and their properties."""

    train: int
    validation: int
    test: int
    facts: DatasetInfo


def split_sizes(prepare: PrepareSettings) -> Sizes:
    """Returns the sizes from SOURCE_SIZES; for folders and .npz files those of the prepared data set.

    Raises UserError if the data set is not prepared, and for splits that leave no training image.
    """
    source, splits = prepare.source, prepare.splits
    if not isinstance(source, Digits | Download):
        return _prepared(source.kind)
    train, test, channels, side, classes = SOURCE_SIZES[source.kind]
    if isinstance(source, Download):
        train = min(train, (source.per_class or train) * classes)
        test = test and min(test, (source.test_per_class or test) * classes)
    held_out = splits.pool + splits.validation + (0 if test else splits.test or 0)
    dataset.check_training_images_remain(held_out, train)
    facts = DatasetInfo(
        channels=channels,
        height=side,
        width=side,
        class_names=tuple(map(str, range(classes))),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
    return Sizes(train - held_out, splits.validation, splits.test or test or 0, facts)


def _prepared(kind: str) -> Sizes:
    if not paths.DATASET.exists():
        raise UserError(
            f"prepare.source: the number of images of a {kind} source is not known yet; run `dvc repro prepare`"
        )
    data = dataset.load(paths.DATASET)
    return Sizes(len(data["train"]), len(data["validation"]), len(data["test"]), data.facts)


@dataclass(frozen=True)
class NetworkCost:
    """Operations per image of a network; `speed()` measures the operations per second of its training steps."""

    flops_per_image: FlopsPerImage
    speed: Callable[[], float]


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage.

    `passes`: attack steps per image and epoch; `training_flops`: operations of training; `evaluation_flops`: operations
    of its validation, or of the evaluation stage; `network`: the network whose speed determines the hours.
    """

    stage: str
    passes: float
    training_flops: float
    evaluation_flops: float
    network: NetworkCost

    @property
    def operations(self) -> float:
        """All operations of the stage."""
        return self.training_flops + self.evaluation_flops


class Forecast:
    """The costs of all stages under `params`; operations per image are counted once for each kind of network."""

    def __init__(self, params: Params, clock: Callable[[], float] = time.perf_counter) -> None:
        self.params, self.sizes, self.clock = params, split_sizes(params.prepare), clock
        self.networks: dict[tuple[BackboneSettings, type], NetworkCost] = {}
        self.expert = self.single(params.model, lambda model: PlainTask(model, params.pretrain))
        self.mixture = self._mixture()

    def jobs(self) -> list[StageCost]:
        """Returns the cost of each stage, in the order of the pipeline."""
        experts = {
            name: self._trained(f"pretrain@{name}", spec, self.params.model, self.params.pretrain)
            for name, spec in self.params.experts.items()
        }
        train = self._job("train", self.mixture, self.params.train, self.params.train.adversary)
        whole = train.operations + sum(experts[name].operations for name in self.params.train.experts)
        found = {
            name: self._baseline(f"baseline@{name}", baseline, train, whole)
            for name, baseline in self.params.baseline.items()
        }
        return [*experts.values(), train, *found.values(), self._evaluation(found)]

    def single(self, backbone: BackboneSettings, make_task: Callable[[nn.Module], TrainingTask]) -> NetworkCost:
        """Returns the cost of a plain network; counted once for each backbone and class of task."""

        def new_task() -> TrainingTask:
            return make_task(classifiers.build(PlainArchitecture(kind="plain", backbone=backbone), self.sizes.facts, 0))

        one = new_task()
        key = (backbone, type(one))
        if key not in self.networks:
            console.info(f"counting {backbone.kind}, width {backbone.width}")
            self.networks[key] = NetworkCost(
                self._count(one), partial(self._measure_speed, new_task, self.params.pretrain)
            )
        return self.networks[key]

    def _plain_task(self, spec: NetworkSpec, model: nn.Module) -> TrainingTask:
        if isinstance(spec, DistilledNetwork):
            return spec.task(self._untrained_mixture(self.params.train), model, self.params.pretrain)
        return task_for(spec, model, self.params.pretrain)

    def _mixture(self) -> NetworkCost:
        """Returns the cost of the mixture, extrapolated linearly from mixtures of one and of two experts.

        Counting the whole mixture would differ only in outputs of the gate's last layer.
        """
        joint = self.params.train
        others = len(joint.experts) - 1
        parts = [joint.model_copy(update={"experts": joint.experts[:count]}) for count in (1, 2)]
        one, two = (self._count(self._mixture_task(part)) for part in parts)  # equal if there is only one expert
        each = FlopsPerImage(
            one.forward + others * (two.forward - one.forward),
            one.pixels + others * (two.pixels - one.pixels),
            one.learning + others * (two.learning - one.learning),
        )
        return NetworkCost(each, partial(self._measure_speed, partial(self._mixture_task, joint), joint))

    def _mixture_task(self, joint: JointConfig) -> TrainingTask:
        return MixtureTask(self._untrained_mixture(joint), joint)

    def _untrained_mixture(self, joint: JointConfig) -> MixtureOfExperts:
        model = classifiers.build(specs.paper_mixture(self.params.model, joint), self.sizes.facts, 0)
        assert isinstance(model, MixtureOfExperts)
        return model

    def _count(self, task: HasLoss) -> FlopsPerImage:
        task.model.to(device())
        return measure_flops(task, *self._random_batch(SAMPLE_SIZE))

    def _random_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns random images (B, C, H, W) in [0, 1] and labels: the cost does not depend on the content."""
        facts = self.sizes.facts
        stream = generator("forecast")
        images = torch.rand(count, facts.channels, facts.height, facts.width, generator=stream)
        return images.to(device()), torch.arange(count, device=device()) % facts.classes

    def _trained(
        self, stage: str, spec: NetworkSpec, backbone: BackboneSettings, recipe: ValidatedTrainingConfig
    ) -> StageCost:
        network = self.single(backbone, partial(self._plain_task, spec))
        return self._job(stage, network, recipe, spec.adversary)

    def _job(
        self, stage: str, network: NetworkCost, recipe: ValidatedTrainingConfig, adversary: Adversary
    ) -> StageCost:
        each, config = network.flops_per_image, recipe.validation
        training = recipe.epochs * self.sizes.train * specs.flops_per_training_image(each, adversary, recipe.gradients)
        per_image = (1 + config.steps) * (each.forward + each.pixels) + 4 * each.forward
        validation = recipe.epochs * min(config.images, self.sizes.validation) * per_image
        return StageCost(stage, expected_passes(adversary), training, validation, network)

    def _baseline(self, stage: str, baseline: specs.Baseline, train: StageCost, whole: float) -> StageCost:
        if not isinstance(baseline, SingleNetwork | DistilledNetwork):
            return StageCost(stage, train.passes, train.training_flops, train.evaluation_flops, train.network)
        backbone = specs.plain_architecture(baseline, self.params.model).backbone
        match = baseline.match if isinstance(baseline, SingleNetwork) else "nothing"
        if match == "parameters":
            mixture = specs.paper_mixture(self.params.model, self.params.train)
            backbone = specs.match_parameters(baseline.backbone, mixture, self.sizes.facts)
        recipe = baseline_config(self.params.pretrain, self.params.train.epochs)
        job = self._trained(stage, baseline, backbone, recipe)
        return job if match != "passes" else StageCost(stage, job.passes, whole, 0.0, job.network)

    # ---- evaluation: an upper bound

    def _evaluation(self, baselines: dict[str, StageCost]) -> StageCost:
        settings = self.params.evaluate
        full = self._attack_flops(self.mixture, settings.all_attacks(), True) + sum(
            self._attack_flops(baselines[name].network, settings.all_attacks(), False) for name in settings.baselines
        )
        few = {name: settings.attacks[name] for name in settings.experts}
        # the uniform average, and the mixture before joint training
        ensembles = 2 * self._attack_flops(self.mixture, few, True, checked=False)
        experts = 2 * len(self.params.train.experts) * self._attack_flops(self.expert, few, False, checked=False)
        return StageCost("evaluate, at most", 0.0, 0.0, full + ensembles + experts, self.mixture)

    def _attack_flops(
        self, network: NetworkCost, attacks: dict[str, AttackSettings], has_gate: bool, *, checked: bool = True
    ) -> float:
        """Returns the operations of the attacks on one model; with `checked` also those of grid and minimal epsilon."""
        settings, each = self.params.evaluate, network.flops_per_image
        images = min(settings.limit or self.sizes.test, self.sizes.test)
        sources = [f"baseline/{name}" for name in settings.baselines]
        counts = [
            (min(images, settings.limits.get(name, images)), attack)
            for name, attack in applicable_attacks(attacks, has_gate, sources).items()
        ]
        if checked:
            counts += [(images, settings.grid.attack)] * len(settings.grid.epsilons) + [(images, settings.minimal)]
        passes = [(count, *registry.REGISTRY[type(attack)].passes(attack)) for count, attack in counts]
        return float(sum(count * (there * each.forward + back * each.pixels) for count, there, back in passes))

    # ---- speed of this machine

    def _measure_speed(self, new_task: Callable[[], TrainingTask], recipe: ValidatedTrainingConfig) -> float:
        """Returns the operations per second of training steps.

        The batch size is doubled up to that of the recipe, or until a step is long enough to be timed and a larger
        batch is no longer faster.
        """
        count, before = min(FIRST_BATCH_SIZE, recipe.batch_size), 0.0
        while True:
            task, (images, labels) = new_task(), self._random_batch(count)
            work = count * specs.flops_per_training_image(self._count(task), TIMED_ATTACK, recipe.gradients)
            run = Trainer(task, self._training_job(recipe.model_copy(update={"batch_size": count}), images, labels))
            seconds = time_step(partial(run.step, images, labels), self.clock)
            if count == recipe.batch_size or (seconds >= MIN_STEP_SECONDS and work / seconds < MIN_SPEEDUP * before):
                return work / seconds
            count, before = min(2 * count, recipe.batch_size), work / seconds

    def _training_job(self, recipe: ValidatedTrainingConfig, images: Tensor, labels: Tensor) -> TrainingJob:
        split = Split((images.cpu() * 255).to(torch.uint8), labels.cpu(), torch.arange(len(labels)))
        data = Dataset({"train": split}, self.sizes.facts, "")
        return TrainingJob("forecast", 0, data, recipe, TIMED_ATTACK, self.params.epsilon, "pgd")


def time_step(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Returns the seconds of one step, after a warm-up step."""
    _run_and_wait(step)
    started = clock()
    _run_and_wait(step)
    return clock() - started


def _run_and_wait(step: Callable[[], object]) -> None:
    step()
    if device().type == "cuda":
        torch.cuda.synchronize()


def rows(jobs: list[StageCost], flops: float | None) -> list[list[str]]:
    """Returns a row per stage and one for all; `flops`: operations per second, None to measure them here."""
    networks = {id(job.network): job.network for job in jobs}  # shared by several stages
    speeds = {key: flops or network.speed() for key, network in networks.items()}
    found, hours = [], 0.0
    for job in jobs:
        speed = speeds[id(job.network)]
        own = job.operations / speed / 3600
        hours += own
        passes = f"{job.passes:.1f}" if job.training_flops else ""
        found.append([job.stage, passes, _petaflop(job.operations), f"{speed / 1e12:.3g}", _hours(own)])
    return [*found, ["all", "", _petaflop(sum(job.operations for job in jobs)), "", _hours(hours)]]


def _petaflop(operations: float) -> str:
    return f"{operations / 1e15:,.3g}" if operations < 1e18 else f"{operations / 1e15:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def show(params: Params, flops: float | None) -> None:
    """Prints the forecast."""
    table = rows(Forecast(params).jobs(), flops)
    console.table("forecast of the cost of params.yaml", COLUMNS, table)
    console.info("passes: attack steps per image and epoch; training in poison, extract and membership is not included")

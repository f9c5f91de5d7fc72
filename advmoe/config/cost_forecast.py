"""What will it cost? Floating-point operations of params.yaml's training and evaluation, and hours at a rate.

    operations = epochs * images * (passes * (forward + pixels) + gradients * learning)     of training
               + epochs * validation images * ((1 + steps) * (forward + pixels) + 4 * forward)     of watching it
    hours      = operations / (operations a second) / 3600

`passes`: steps of the attack that a batch meets, on average over the draws; `gradients`: one, or two where weights are
perturbed; `forward`, `pixels` and `learning`: what an image costs, counted on the network itself
(`advmoe.training.flops`). TRADES looks at each image once more before it attacks. Of MoRE, top-1 and
Synergy-of-Experts, which freeze parts or leave a recipe's clean pass out, this is an upper bound. The rate is given, or
measured here on a few steps of the training loop. Evaluation is an upper bound: every image is taken for one that no
attack fells.

Studies of poisoning, extraction and membership train the same networks again; they are not forecast.

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

Known = tuple[int, int | None, Literal[1, 3], int, int]
KNOWN: dict[
    str, Known
] = {  # images to train on and to test on (None: taken from the former), channels, pixels a side, classes
    "digits": (1797, None, 1, 8, 10),
    "cifar10": (50_000, 10_000, 3, 32, 10),
    "cifar100": (50_000, 10_000, 3, 32, 100),
    "svhn": (73_257, 26_032, 3, 32, 10),
    "mnist": (60_000, 10_000, 1, 28, 10),
    "fashion-mnist": (60_000, 10_000, 1, 28, 10),
}
PROBE = PgdBatches(kind="pgd", steps=(3,), step_size=0.25)  # of the steps that are timed
LONG_ENOUGH = 1.0  # seconds of a step, to be timed
FIRST_BATCH, GAIN = 4, 1.1  # images; doubled as long as that gains a tenth
COLUMNS = ("stage", "passes", "PFLOP", "TFLOP/s", "hours")


@dataclass(frozen=True)
class Sizes:
    """How many images there are in the splits, and their shape."""

    train: int
    validation: int
    test: int
    facts: DatasetInfo


def sizes(prepare: PrepareSettings) -> Sizes:
    """From what is known of the source; of others from what `prepare` left.

    Raises UserError where that is not there, and for splits that leave nothing to train on.
    """
    source, splits = prepare.source, prepare.splits
    if not isinstance(source, Digits | Download):
        return _prepared(source.kind)
    train, test, channels, side, classes = KNOWN[source.kind]
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
            f"prepare.source: how many images a {kind} holds shows when they are prepared; run `dvc repro prepare`"
        )
    data = dataset.load(paths.DATASET)
    return Sizes(len(data["train"]), len(data["validation"]), len(data["test"]), data.facts)


@dataclass(frozen=True)
class Network:
    """A network to train, what an image costs it, and a way to time it: operations a second of its training steps."""

    each: FlopsPerImage
    speed: Callable[[], float]


@dataclass(frozen=True)
class Job:
    """A stage: `passes` forwards and back that an image is attacked with in an epoch, operations of `training` and of
    what goes beside it (looks at the validation split), and whose speed it has.
    """

    stage: str
    passes: float
    training: float
    beside: float
    network: Network

    @property
    def operations(self) -> float:
        """All of them."""
        return self.training + self.beside


class Forecast:
    """The jobs that params.yaml describes; what an image costs is counted once for each kind of network."""

    def __init__(self, params: Params, clock: Callable[[], float] = time.perf_counter) -> None:
        self.params, self.sizes, self.clock = params, sizes(params.prepare), clock
        self.networks: dict[tuple[BackboneSettings, type], Network] = {}
        self.expert = self.single(params.model, lambda model: PlainTask(model, params.pretrain))
        self.mixture = self._mixture()

    def jobs(self) -> list[Job]:
        """In the order of the pipeline."""
        experts = {
            name: self._trained(f"pretrain@{name}", student, self.params.model, self.params.pretrain)
            for name, student in self.params.experts.items()
        }
        train = self._job("train", self.mixture, self.params.train, self.params.train.adversary)
        whole = train.operations + sum(experts[name].operations for name in self.params.train.experts)
        found = {
            name: self._comparator(f"baseline@{name}", comparator, train, whole)
            for name, comparator in self.params.baseline.items()
        }
        return [*experts.values(), train, *found.values(), self._evaluation(found)]

    def single(self, backbone: BackboneSettings, learner: Callable[[nn.Module], TrainingTask]) -> Network:
        """A plain network that learns in this way; counted once for each backbone and kind of learner."""

        def fresh() -> TrainingTask:
            return learner(classifiers.build(PlainArchitecture(kind="plain", backbone=backbone), self.sizes.facts, 0))

        one = fresh()
        key = (backbone, type(one))
        if key not in self.networks:
            console.info(f"counting {backbone.kind}, width {backbone.width}")
            self.networks[key] = Network(self._count(one), partial(self._speed, fresh, self.params.pretrain))
        return self.networks[key]

    def _learner_of(self, student: NetworkSpec, model: nn.Module) -> TrainingTask:
        if isinstance(student, DistilledNetwork):
            return student.task(self._untrained(self.params.train), model, self.params.pretrain)
        return task_for(student, model, self.params.pretrain)

    def _mixture(self) -> Network:
        """One expert with a gate is counted, and what a second one adds, the others times: as much as all of it counted
        at once, but for a few outputs of the gate's last layer.
        """
        joint = self.params.train
        others = len(joint.experts) - 1
        one, two = (
            self._count(self._learner(joint.model_copy(update={"experts": joint.experts[:count]}))) for count in (1, 2)
        )  # two are one where there is one: it adds nothing
        each = FlopsPerImage(
            one.forward + others * (two.forward - one.forward),
            one.pixels + others * (two.pixels - one.pixels),
            one.learning + others * (two.learning - one.learning),
        )
        return Network(each, partial(self._speed, partial(self._learner, joint), joint))

    def _learner(self, joint: JointConfig) -> TrainingTask:
        return MixtureTask(self._untrained(joint), joint)

    def _untrained(self, joint: JointConfig) -> MixtureOfExperts:
        model = classifiers.build(specs.paper_mixture(self.params.model, joint), self.sizes.facts, 0)
        assert isinstance(model, MixtureOfExperts)
        return model

    def _count(self, learner: HasLoss) -> FlopsPerImage:
        learner.model.to(device())
        return measure_flops(learner, *self._noise(SAMPLE_SIZE))

    def _noise(self, count: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] and labels: what they show does not matter for what they cost."""
        facts = self.sizes.facts
        stream = generator("forecast")
        images = torch.rand(count, facts.channels, facts.height, facts.width, generator=stream)
        return images.to(device()), torch.arange(count, device=device()) % facts.classes

    def _trained(
        self, stage: str, student: NetworkSpec, backbone: BackboneSettings, recipe: ValidatedTrainingConfig
    ) -> Job:
        network = self.single(backbone, partial(self._learner_of, student))
        return self._job(stage, network, recipe, student.adversary)

    def _job(self, stage: str, network: Network, recipe: ValidatedTrainingConfig, adversary: Adversary) -> Job:
        each, watched = network.each, recipe.validation
        training = recipe.epochs * self.sizes.train * specs.flops_per_training_image(each, adversary, recipe.gradients)
        looks = (1 + watched.steps) * (each.forward + each.pixels) + 4 * each.forward
        beside = recipe.epochs * min(watched.images, self.sizes.validation) * looks
        return Job(stage, expected_passes(adversary), training, beside, network)

    def _comparator(self, stage: str, comparator: specs.Baseline, train: Job, whole: float) -> Job:
        if not isinstance(comparator, SingleNetwork | DistilledNetwork):
            return Job(stage, train.passes, train.training, train.beside, train.network)
        backbone = specs.plain_architecture(comparator, self.params.model).backbone
        match = comparator.match if isinstance(comparator, SingleNetwork) else "nothing"
        if match == "parameters":
            mixture = specs.paper_mixture(self.params.model, self.params.train)
            backbone = specs.match_parameters(comparator.backbone, mixture, self.sizes.facts)
        recipe = baseline_config(self.params.pretrain, self.params.train.epochs)
        job = self._trained(stage, comparator, backbone, recipe)
        return job if match != "passes" else Job(stage, job.passes, whole, 0.0, job.network)

    # ---- evaluation, at most

    def _evaluation(self, baselines: dict[str, Job]) -> Job:
        settings = self.params.evaluate
        full = self._met(self.mixture, settings.all_attacks(), True) + sum(
            self._met(baselines[name].network, settings.all_attacks(), False) for name in settings.baselines
        )
        some = {name: settings.attacks[name] for name in settings.experts}
        ensembles = 2 * self._met(self.mixture, some, True, judged=False)  # the average, and before joint training
        experts = 2 * len(self.params.train.experts) * self._met(self.expert, some, False, judged=False)
        return Job("evaluate, at most", 0.0, 0.0, full + ensembles + experts, self.mixture)

    def _met(
        self, network: Network, attacks: dict[str, AttackSettings], has_gate: bool, *, judged: bool = True
    ) -> float:
        """Operations of the attacks on one model; those that are judged are attacked over the grid, too."""
        settings, each = self.params.evaluate, network.each
        images = min(settings.limit or self.sizes.test, self.sizes.test)
        sources = [f"baseline/{name}" for name in settings.baselines]
        counts = [
            (min(images, settings.limits.get(name, images)), attack)
            for name, attack in applicable_attacks(attacks, has_gate, sources).items()
        ]
        if judged:
            counts += [(images, settings.grid.attack)] * len(settings.grid.epsilons) + [(images, settings.minimal)]
        passes = [(count, *registry.REGISTRY[type(attack)].passes(attack)) for count, attack in counts]
        return float(sum(count * (there * each.forward + back * each.pixels) for count, there, back in passes))

    # ---- how fast this machine is

    def _speed(self, fresh: Callable[[], TrainingTask], recipe: ValidatedTrainingConfig) -> float:
        """Operations a second of training steps. The batch grows to the recipe's, or until a larger one brings nothing
        and a step takes long enough to be timed.
        """
        count, before = min(FIRST_BATCH, recipe.batch_size), 0.0
        while True:
            learner, (images, labels) = fresh(), self._noise(count)
            work = count * specs.flops_per_training_image(self._count(learner), PROBE, recipe.gradients)
            run = Trainer(learner, self._course(recipe.model_copy(update={"batch_size": count}), images, labels))
            seconds = timed(partial(run.step, images, labels), self.clock)
            if count == recipe.batch_size or (seconds >= LONG_ENOUGH and work / seconds < GAIN * before):
                return work / seconds
            count, before = min(2 * count, recipe.batch_size), work / seconds

    def _course(self, recipe: ValidatedTrainingConfig, images: Tensor, labels: Tensor) -> TrainingJob:
        split = Split((images.cpu() * 255).to(torch.uint8), labels.cpu(), torch.arange(len(labels)))
        data = Dataset({"train": split}, self.sizes.facts, "")
        return TrainingJob("forecast", 0, data, recipe, PROBE, self.params.epsilon, "pgd")


def timed(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a step, after one that warms up."""
    _finished(step)
    started = clock()
    _finished(step)
    return clock() - started


def _finished(step: Callable[[], object]) -> None:
    step()
    if device().type == "cuda":
        torch.cuda.synchronize()


def rows(jobs: list[Job], flops: float | None) -> list[list[str]]:
    """A row for each stage and one for all; `flops`: operations a second, None for what this machine does."""
    networks = {id(job.network): job.network for job in jobs}  # which many jobs share
    speeds = {key: flops or network.speed() for key, network in networks.items()}
    found, hours = [], 0.0
    for job in jobs:
        speed = speeds[id(job.network)]
        own = job.operations / speed / 3600
        hours += own
        passes = f"{job.passes:.1f}" if job.training else ""
        found.append([job.stage, passes, _petaflop(job.operations), f"{speed / 1e12:.3g}", _hours(own)])
    return [*found, ["all", "", _petaflop(sum(job.operations for job in jobs)), "", _hours(hours)]]


def _petaflop(operations: float) -> str:
    return f"{operations / 1e15:,.3g}" if operations < 1e18 else f"{operations / 1e15:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def show(params: Params, flops: float | None) -> None:
    """Print what is to be expected."""
    table = rows(Forecast(params).jobs(), flops)
    console.table("what params.yaml costs", COLUMNS, table)
    console.info(
        "passes: attack steps an image meets in an epoch; poison, extract and membership train more, not counted"
    )

"""One attack tried on its victims: poison, train, measure, defend, write everything down.

Shapes: N images, E experts.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advmoe.core import console, files
from advmoe.core.artifacts import hash_tensors
from advmoe.core.errors import UserError
from advmoe.data.batches import Augmentation
from advmoe.data.dataset import Dataset, Split
from advmoe.models import classifiers
from advmoe.models.classifiers import Plain
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback, checkpointing
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import device, generator
from advmoe.threats.poisoning import metrics, poisoned_set, preview, registry, report
from advmoe.threats.poisoning.config import Common, Study
from advmoe.threats.poisoning.detectors.evidence import Evidence
from advmoe.threats.poisoning.detectors.registry import AnyDefence, flag
from advmoe.threats.poisoning.metrics import Answers, Exam, Pair
from advmoe.threats.poisoning.poisoned_set import About, Poisoned
from advmoe.threats.poisoning.report import Row
from advmoe.threats.victim_training import (
    JOINT_ONLY,
    MIXTURE,
    VictimRecipes,
    VictimSpec,
    is_mixture,
    pipeline_twin,
    train_proxy,
    train_victims,
)
from advmoe.training.job_key import model_fingerprint
from advmoe.training.trainer import TrainingResult


@dataclass(frozen=True)
class PoisonExperiment:
    """Everything that a study starts from."""

    name: str
    study: Study
    common: Common
    recipes: VictimRecipes
    data: Dataset

    @property
    def exam(self) -> Exam:
        """What every model is asked."""
        recipes = self.recipes
        test = self.data["test"].first(self.common.images)
        return Exam(test, self.common.robust, recipes.epsilon, recipes.seed, recipes.pretrain.precision)


@dataclass(frozen=True)
class Dose:
    """One poisoned set: its rate, what is added to the seed, the number of the trial, and where it lies."""

    rate: float
    added: int
    trial: int
    poisoned: Poisoned
    sha256: str

    @property
    def title(self) -> str:
        """A name for files."""
        return _title(self.rate, self.added, self.trial)


def _title(rate: float, added: int, trial: int) -> str:
    return f"rate-{rate:g}-seed-{added}-trial-{trial}"


@dataclass
class Workshop:
    """What the attacker has to make a set called `title`; networks are trained when first asked for."""

    case: PoisonExperiment
    recipes: VictimRecipes
    title: str = ""
    trained: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Of the data set."""
        return self.case.data.facts.classes

    @property
    def augmentation(self) -> Augmentation:
        """The victims'."""
        return self.recipes.pretrain.augmentation

    @property
    def candidates(self) -> Split:
        """Images whose misclassification may be wanted: the test images that victims will be asked about."""
        return self.case.exam.split

    def proxy(self, baseline: str) -> nn.Module:
        """Raises UserError for a baseline that params.yaml has not."""
        if baseline not in self.recipes.baselines:
            raise UserError(
                f"proxy: no baseline is called '{baseline}'; there are {files.names(self.recipes.baselines)}"
            )
        if baseline not in self.trained:
            console.say(f"the attacker trains a network of its own, as {baseline} is trained")
            proxy = train_proxy(baseline, self.recipes, self.case.common.proxy_seed)
            twin = pipeline_twin(baseline, self.recipes)
            assert twin is None or _weights(proxy) != _weights(twin), "the proxy is the victim"
            self.trained[baseline] = proxy
        return self.trained[baseline]

    def fresh(self) -> nn.Module:
        """Of the victims' kind, from a start of its own."""
        plain = Plain(kind="plain", backbone=self.recipes.backbone)
        seed = ("poison", self.case.common.proxy_seed, self.recipes.run_seed)
        return classifiers.build(plain, self.case.data.facts, *seed).to(device())

    def keep(self, work: Resumable) -> AbstractContextManager[StepCallback]:
        """Beside what determines the study: which of its sets this is."""
        name = f"{self.case.study.attack.kind} {self.title}"
        return checkpointing(work, name, workdir.checkpoint_path(self.recipes.shelf, "crafting", self.title))


def _weights(model: nn.Module) -> str:
    """Hash of what is learned: the count of batches, which is in state_dict() too, does not survive the disk."""
    return hash_tensors(dict(model.named_parameters()))


@dataclass(frozen=True)
class OutputPaths:
    """Where a study goes: poisoned sets and victims, the headline, every run, and plots with the picture."""

    models: Path
    metrics: Path
    runs: Path
    plots: Path


def run_experiment(case: PoisonExperiment, places: OutputPaths) -> None:
    """Run a study, write it down and show it; what was done before a kill is taken over.

    Raises UserError for what cannot be.
    """
    facts = (case.study, case.common, case.recipes, case.data.sha256)
    with workdir.open_workdir(f"poison-{case.name}", *facts) as shelf:
        _conduct(replace(case, recipes=replace(case.recipes, shelf=shelf)), places)


def _conduct(case: PoisonExperiment, places: OutputPaths) -> None:
    rows, doses = run(case, places.models)
    about = {"attack": case.study.attack.kind, "epsilon": case.recipes.epsilon, "images": len(case.exam.split)}
    report.write(rows, about, places.metrics, places.runs, places.plots / "curve.csv")
    drawn = examples(case, max(doses, key=lambda dose: dose.rate).poisoned)
    if drawn is not None:
        files.write_bytes(places.plots / "examples.png", drawn)
    report.show(case.name, rows, len(case.exam.split))
    console.say(f"numbers: {places.metrics}, {places.runs}   pictures: {places.plots}/   models: {places.models}/")


def run(case: PoisonExperiment, folder: Path) -> tuple[list[Row], list[Dose]]:
    """Poison, train, measure, defend; poisoned sets and victims are written to `folder`. Returns results and poison."""
    _check(case)
    doses = list(_poison(case, folder))
    orders = [
        (dose, VictimSpec(victim, case.recipes.under(dose.added), _split(case, dose.poisoned)))
        for dose in doses
        for victim in case.study.victims
    ]
    at_hand, missing = _twins(case)
    # all at once, so that no core waits for the last twin
    made = train_victims([*missing.values(), *(order for _, order in orders)])
    fresh, trained = made[: len(missing)], made[len(missing) :]
    models = at_hand | {key: twin.model for key, twin in zip(missing, fresh, strict=True)}
    twins = {key: _examined(case, model) for key, model in models.items()}
    rows: list[Row] = []
    for (dose, order), victim in zip(orders, trained, strict=True):
        _save(case, folder, dose, order, victim, "")
        rows.append(_measure(case, dose, order, victim.model, twins, ""))
        console.say(report.sentence(rows[-1]))
    rows += _defend(case, folder, orders, trained, twins)
    return rows, doses


def _check(case: PoisonExperiment) -> None:
    known = (MIXTURE, JOINT_ONLY, *case.recipes.baselines)
    strangers = [victim for victim in case.study.victims if victim not in known]
    if strangers:
        raise UserError(f"victim '{strangers[0]}' is not known; there are {files.names(known)}")
    detectors = case.common.defence
    strangers = [defence for defence in case.study.defences if defence not in detectors]
    if strangers:
        raise UserError(f"defence '{strangers[0]}' is not known; there are {files.names(detectors)}")


def _split(case: PoisonExperiment, changed: Poisoned) -> Split:
    return Split(changed.images, changed.labels, case.data["train"].index)


def _poison(case: PoisonExperiment, folder: Path) -> Iterable[Dose]:
    """Every poisoned set, drawn once, written down, and only then learned from."""
    study, recipes = case.study, case.recipes
    for added in study.seeds:
        workshop = Workshop(case, recipes.under(added))
        for rate in study.rates:
            for trial in range(registry.trials(study.attack)):
                started = time.monotonic()
                changed = _made(replace(workshop, title=_title(rate, added, trial)), rate, trial)
                about = About(
                    attack=study.attack.kind,
                    rate=rate,
                    of=changed.of,
                    available=changed.available,
                    goal=changed.goal,
                    added=added,
                    trial=trial,
                )
                sha256 = poisoned_set.save(
                    folder / f"{_title(rate, added, trial)}.safetensors",
                    changed,
                    about,
                    params=study.model_dump(mode="json"),
                    dataset=case.data.sha256,
                    seed=recipes.seed + added,
                    seconds=time.monotonic() - started,
                )
                yield Dose(rate, added, trial, changed, sha256)


def _made(workshop: Workshop, rate: float, trial: int) -> Poisoned:
    """The set that was crafted before a kill, else crafted now and kept."""
    case, attack = workshop.case, workshop.case.study.attack
    # no rate in the stream's name: the images of a lower rate are among those of a higher one
    stream = generator(workshop.recipes.run_seed, "poison", attack.kind, trial)

    def craft() -> Poisoned:
        return registry.poison(case.data["train"], stream, attack, rate, workshop)

    if type(attack) in registry.PLAIN:  # takes less time than to read it
        return craft()
    file = workdir.checkpoint_path(workshop.recipes.shelf, "poisoned", workshop.title)
    return storage.load_or_compute(file, lambda: poisoned_set.to_keep(craft()), poisoned_set.as_kept)


@dataclass(frozen=True)
class Twin:
    """A clean model with its answers to the exam."""

    model: nn.Module
    answers: Answers


Key = tuple[str, int]  # of a clean twin: whose, and what is added to the seed


def _twins(case: PoisonExperiment) -> tuple[dict[Key, nn.Module], dict[Key, VictimSpec]]:
    """The clean twin of every victim and seed: the pipeline's own model where it fits, else an order to train one."""
    names = dict.fromkeys(_twin_of(victim) for victim in case.study.victims)
    found = {
        (name, added): pipeline_twin(name, case.recipes.under(added)) for added in case.study.seeds for name in names
    }
    missing = [key for key, model in found.items() if model is None]
    if missing:
        console.say(f"clean twins to train: {files.names(f'{name} (seed + {added})' for name, added in missing)}")
    return (
        {key: model for key, model in found.items() if model is not None},
        {(name, added): VictimSpec(name, case.recipes.under(added), None) for name, added in missing},
    )


def _examined(case: PoisonExperiment, model: nn.Module) -> Twin:
    here = model.to(device())
    return Twin(here, _answers(case, here))


def _answers(case: PoisonExperiment, model: nn.Module) -> Answers:
    """To the exam; a model that was asked before a kill is not asked again."""
    file = workdir.checkpoint_path(case.recipes.shelf, "answers", model_fingerprint(model))
    return storage.load_or_compute(
        file, lambda: Checkpoint(vars(metrics.examine(model, case.exam)), {}), lambda found: Answers(**found.tensors)
    )


def _twin_of(victim: str) -> str:
    """Without poison there is no difference between the two ways to poison a mixture."""
    return MIXTURE if victim == JOINT_ONLY else victim


def _measure(
    case: PoisonExperiment, dose: Dose, order: VictimSpec, model: nn.Module, twins: Mapping[Key, Twin], defence: str
) -> Row:
    exam, twin = case.exam, twins[_twin_of(order.victim), dose.added]
    victim = model.to(device())
    answers = _answers(case, victim)
    experts: Sequence[str] = case.recipes.joint.experts if is_mixture(order.victim) else ()
    found = metrics.numbers(Pair(victim, twin.model, answers, twin.answers), dose.poisoned, exam, experts)
    return Row(order.victim, dose.rate, dose.added, dose.trial, defence, found, _amounts(dose))


def _amounts(dose: Dose) -> dict[str, Any]:
    """How much was poisoned, with every denominator named."""
    changed = dose.poisoned
    total, target = len(changed.labels), changed.goal.target
    amounts: dict[str, Any] = {
        "n_poison": len(changed.rows),
        "rate_of": changed.of,
        "share_of_set": round(len(changed.rows) / total, 6),
        "sha256": dose.sha256,
    }
    if target is not None:
        of_class = int((changed.labels == target).sum())
        poisoned_there = int((changed.labels[changed.rows] == target).sum())
        amounts["share_of_target_class"] = round(poisoned_there / of_class, 6)
    return amounts


def _defend(
    case: PoisonExperiment,
    folder: Path,
    orders: Sequence[tuple[Dose, VictimSpec]],
    trained: Sequence[TrainingResult],
    twins: Mapping[Key, Twin],
) -> list[Row]:
    """For every victim and defence: what is flagged, and the victim that learns from the rest."""
    again, flags = [], []
    for (dose, order), made in zip(orders, trained, strict=True):
        for name in case.study.defences:
            flagged = _flagged(case, dose, made.model, name, case.common.defence[name])
            kept = _without(_split(case, dose.poisoned), flagged, name)
            again.append((dose, VictimSpec(order.victim, order.recipes, kept), name))
            flags.append(metrics.detected(flagged, dose.poisoned.is_poison))
    rows = []
    retrained = train_victims([order for _, order, _ in again])
    for (dose, order, name), found, made in zip(again, flags, retrained, strict=True):
        _save(case, folder, dose, order, made, name)
        row = _measure(case, dose, order, made.model, twins, name)
        row.found.update(found)
        rows.append(row)
        console.say(report.sentence(row))
    return rows


def _flagged(case: PoisonExperiment, dose: Dose, victim: nn.Module, name: str, settings: AnyDefence) -> torch.Tensor:
    stream = generator(case.recipes.seed + dose.added, "defence", name, dose.title)
    evidence = Evidence(victim.to(device()), _split(case, dose.poisoned), case.data["validation"], stream)
    facts = (name, dose.title, dose.sha256, model_fingerprint(victim))
    file = workdir.checkpoint_path(case.recipes.shelf, "flagged", *facts)

    def look() -> Checkpoint:
        return Checkpoint({"flagged": flag(evidence, settings, dose.poisoned.is_poison)}, {})

    return storage.load_or_compute(file, look, lambda found: found.tensors["flagged"])


def _without(train: Split, flagged_N: torch.Tensor, name: str) -> Split:
    """The training split without the flagged images. Raises UserError when a whole class would be gone."""
    kept = ~flagged_N
    gone = sorted(set(train.labels.tolist()) - set(train.labels[kept].tolist()))
    if gone:
        raise UserError(f"defence '{name}' removes all training images of class {gone[0]}; let it remove fewer")
    return Split(train.images[kept], train.labels[kept], train.index[kept])


def _save(
    case: PoisonExperiment, folder: Path, dose: Dose, order: VictimSpec, made: TrainingResult, defence: str
) -> None:
    recipes = order.recipes
    classifiers.save(
        folder / dose.title / f"{order.victim}{'-' + defence if defence else ''}.safetensors",
        made.model,
        recipes.architecture(order.victim),
        case.data.facts,
        params={"study": case.study.model_dump(mode="json"), "defence": defence, "epsilon": recipes.epsilon},
        inputs={"dataset": case.data.sha256, "poisoned set": dose.sha256},
        seed=recipes.run_seed,
        metrics={"validation": made.kept, "alarms": made.alarms},
        seconds=made.seconds,
    )
    for alarm in made.alarms:
        console.warn(alarm)


def examples(case: PoisonExperiment, changed: Poisoned) -> bytes | None:
    """A picture of poison, None for attacks that change labels only."""
    if changed.trigger is not None:
        clean = case.exam.split.images
        return preview.examples(clean, changed.trigger.stamp(clean))
    clean = case.data["train"].images[changed.rows]
    now = changed.images[changed.rows]
    return None if torch.equal(clean, now) else preview.examples(clean, now)

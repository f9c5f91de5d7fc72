"""One poisoning study: poisons the training set, trains victims and clean twins, measures, and applies defences.

A clean twin is the network that the victim would be without poison. Shapes: N images, E experts.
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
from advmoe.models.classifiers import PlainArchitecture
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.checkpoints.workdir import open_workdir
from advmoe.runtime.machine import device, generator
from advmoe.threats.experiment import OutputPaths, load_or_compute, print_outputs, resumable_loop
from advmoe.threats.poisoning import metrics, poisoned_set, preview, registry, report
from advmoe.threats.poisoning.config import Common, Study
from advmoe.threats.poisoning.detectors.inputs import DetectorInputs
from advmoe.threats.poisoning.detectors.registry import AnyDetector, flag_poison
from advmoe.threats.poisoning.metrics import EvaluationInputs, Predictions, VictimTwinPair
from advmoe.threats.poisoning.poisoned_set import PoisonedSet, PoisonedSetInfo
from advmoe.threats.poisoning.report import Row
from advmoe.threats.victim_training import (
    JOINT_ONLY,
    MIXTURE,
    VictimRecipes,
    VictimSpec,
    is_mixture,
    matching_pipeline_model,
    train_proxy,
    train_victims,
)
from advmoe.training.job import TrainingResult
from advmoe.training.job_key import model_fingerprint


@dataclass(frozen=True)
class PoisonExperiment:
    """All inputs of a study."""

    name: str
    study: Study
    common: Common
    recipes: VictimRecipes
    data: Dataset

    @property
    def evaluation_inputs(self) -> EvaluationInputs:
        """Test images and settings with which every model is evaluated."""
        recipes = self.recipes
        test = self.data["test"].first(self.common.images)
        return EvaluationInputs(test, self.common.robust, recipes.epsilon, recipes.seed, recipes.pretrain.precision)


@dataclass(frozen=True)
class PoisonRun:
    """One poisoned set with its rate, the offset to the project's seed, the number of the trial, and its hash."""

    rate: float
    seed_offset: int
    trial: int
    poisoned: PoisonedSet
    sha256: str

    @property
    def title(self) -> str:
        """The stem of the file names of this run."""
        return _run_title(self.rate, self.seed_offset, self.trial)


def _run_title(rate: float, seed_offset: int, trial: int) -> str:
    return f"rate-{rate:g}-seed-{seed_offset}-trial-{trial}"


@dataclass
class ExperimentContext:
    """The `AttackContext` for the poisoned set called `title`; proxies are trained on first use and cached."""

    experiment: PoisonExperiment
    recipes: VictimRecipes
    title: str = ""
    proxies: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Number of classes of the data set."""
        return self.experiment.data.facts.classes

    @property
    def augmentation(self) -> Augmentation:
        """Augmentation in the training of the victims."""
        return self.recipes.pretrain.augmentation

    @property
    def candidates(self) -> Split:
        """Images that an attack may choose as its target: the test images on which victims are evaluated."""
        return self.experiment.evaluation_inputs.split

    def proxy(self, baseline: str) -> nn.Module:
        """Returns the attacker's trained proxy network. Raises UserError for a baseline that params.yaml lacks."""
        if baseline not in self.recipes.baselines:
            raise UserError(
                f"proxy: no baseline is called '{baseline}'; there are {files.join_names(self.recipes.baselines)}"
            )
        if baseline not in self.proxies:
            console.info(f"training the attacker's proxy network with the recipe of baseline {baseline}")
            proxy = train_proxy(baseline, self.recipes, self.experiment.common.proxy_seed)
            twin = matching_pipeline_model(baseline, self.recipes)
            assert twin is None or _hash_parameters(proxy) != _hash_parameters(twin), "the proxy is the victim"
            self.proxies[baseline] = proxy
        return self.proxies[baseline]

    def untrained_network(self) -> nn.Module:
        """Returns a network with the victims' backbone and an initialisation that no victim has."""
        plain = PlainArchitecture(kind="plain", backbone=self.recipes.backbone)
        seed = ("poison", self.experiment.common.proxy_seed, self.recipes.run_seed)
        return classifiers.build(plain, self.experiment.data.facts, *seed).to(device())

    def checkpointing(self, work: Resumable) -> AbstractContextManager[StepCallback]:
        """Makes the crafting of this poisoned set resumable."""
        title = f"{self.experiment.study.attack.kind} {self.title}"
        return resumable_loop(self.recipes.checkpoint_dir, "crafting", (self.title,), work, title)


def _hash_parameters(model: nn.Module) -> str:
    """Hash of the learned parameters; state_dict() also counts batches, and that count is not saved to files."""
    return hash_tensors(dict(model.named_parameters()))


def run_experiment(experiment: PoisonExperiment, outputs: OutputPaths) -> None:
    """Runs a study, writes its results and prints them; continues from the checkpoints of an interrupted run.

    Raises UserError for a study that cannot run on this data.
    """
    facts = (experiment.study, experiment.common, experiment.recipes, experiment.data.sha256)
    with open_workdir(f"poison-{experiment.name}", *facts) as checkpoint_dir:
        recipes = replace(experiment.recipes, checkpoint_dir=checkpoint_dir)
        _run_and_write(replace(experiment, recipes=recipes), outputs)


def _run_and_write(experiment: PoisonExperiment, outputs: OutputPaths) -> None:
    rows, poison_runs = run(experiment, outputs.models)
    images = len(experiment.evaluation_inputs.split)
    about = {"attack": experiment.study.attack.kind, "epsilon": experiment.recipes.epsilon, "images": images}
    report.write(rows, about, outputs.metrics, outputs.runs, outputs.plots / "curve.csv")
    image = preview_image(experiment, max(poison_runs, key=lambda poison_run: poison_run.rate).poisoned)
    if image is not None:
        files.write_bytes(outputs.plots / "examples.png", image)
    report.show(experiment.name, rows, images)
    print_outputs(outputs, outputs.plots, outputs.models)


def run(experiment: PoisonExperiment, folder: Path) -> tuple[list[Row], list[PoisonRun]]:
    """Runs a study and returns its results and poisoned sets; writes poisoned sets and victims to `folder`."""
    _check_names(experiment)
    poison_runs = list(_craft_poisoned_sets(experiment, folder))
    victims = [
        (
            poison_run,
            VictimSpec(
                victim,
                experiment.recipes.with_seed_offset(poison_run.seed_offset),
                _train_split(experiment, poison_run.poisoned),
            ),
        )
        for poison_run in poison_runs
        for victim in experiment.study.victims
    ]
    available, missing = _clean_twins(experiment)
    # one call, so that all cores are used until the last twin is trained
    results = train_victims([*missing.values(), *(spec for _, spec in victims)])
    new_twins, trained = results[: len(missing)], results[len(missing) :]
    models = available | {key: twin.model for key, twin in zip(missing, new_twins, strict=True)}
    twins = {key: _evaluate_twin(experiment, model) for key, model in models.items()}
    rows: list[Row] = []
    for (poison_run, spec), result in zip(victims, trained, strict=True):
        _save_victim(experiment, folder, poison_run, spec, result, "")
        rows.append(_measure(experiment, poison_run, spec, result.model, twins, ""))
        console.info(report.summary_line(rows[-1]))
    rows += _run_defences(experiment, folder, victims, trained, twins)
    return rows, poison_runs


def _check_names(experiment: PoisonExperiment) -> None:
    known = (MIXTURE, JOINT_ONLY, *experiment.recipes.baselines)
    unknown = [victim for victim in experiment.study.victims if victim not in known]
    if unknown:
        raise UserError(f"victim '{unknown[0]}' is not known; there are {files.join_names(known)}")
    detectors = experiment.common.defence
    unknown = [defence for defence in experiment.study.defences if defence not in detectors]
    if unknown:
        raise UserError(f"defence '{unknown[0]}' is not known; there are {files.join_names(detectors)}")


def _train_split(experiment: PoisonExperiment, poisoned: PoisonedSet) -> Split:
    return Split(poisoned.images, poisoned.labels, experiment.data["train"].index)


def _craft_poisoned_sets(experiment: PoisonExperiment, folder: Path) -> Iterable[PoisonRun]:
    """Crafts every poisoned set once and writes it, before any victim is trained."""
    study, recipes = experiment.study, experiment.recipes
    for seed_offset in study.seeds:
        context = ExperimentContext(experiment, recipes.with_seed_offset(seed_offset))
        for rate in study.rates:
            for trial in range(registry.trials_per_rate(study.attack)):
                started = time.monotonic()
                title = _run_title(rate, seed_offset, trial)
                poisoned = _load_or_craft(replace(context, title=title), rate, trial)
                about = PoisonedSetInfo(
                    attack=study.attack.kind,
                    rate=rate,
                    of=poisoned.rate_of,
                    available=poisoned.available,
                    goal=poisoned.goal,
                    added=seed_offset,
                    trial=trial,
                )
                sha256 = poisoned_set.save(
                    folder / f"{title}.safetensors",
                    poisoned,
                    about,
                    params=study.model_dump(mode="json"),
                    dataset=experiment.data.sha256,
                    seed=recipes.seed + seed_offset,
                    seconds=time.monotonic() - started,
                )
                yield PoisonRun(rate, seed_offset, trial, poisoned, sha256)


def _load_or_craft(context: ExperimentContext, rate: float, trial: int) -> PoisonedSet:
    experiment, attack = context.experiment, context.experiment.study.attack
    # the rate is no part of the seed: the images of a lower rate are among those of a higher one
    stream = generator(context.recipes.run_seed, "poison", attack.kind, trial)

    def craft() -> PoisonedSet:
        return registry.poison(experiment.data["train"], stream, attack, rate, context)

    if type(attack) in registry.DATA_ONLY_ATTACKS:  # crafting is faster than loading
        return craft()
    return load_or_compute(
        context.recipes.checkpoint_dir,
        "poisoned",
        (context.title,),
        lambda: poisoned_set.to_checkpoint(craft()),
        poisoned_set.from_checkpoint,
    )


@dataclass(frozen=True)
class CleanTwin:
    """A network trained on the clean set, with its predictions on the test images."""

    model: nn.Module
    predictions: Predictions


TwinKey = tuple[str, int]  # name of the victim without poison, seed offset


def _clean_twins(experiment: PoisonExperiment) -> tuple[dict[TwinKey, nn.Module], dict[TwinKey, VictimSpec]]:
    """Returns the clean twins that the pipeline has trained already, and specs of those that are missing."""
    names = dict.fromkeys(_twin_name(victim) for victim in experiment.study.victims)
    twins = {
        (name, seed_offset): matching_pipeline_model(name, experiment.recipes.with_seed_offset(seed_offset))
        for seed_offset in experiment.study.seeds
        for name in names
    }
    missing = [key for key, model in twins.items() if model is None]
    if missing:
        titles = files.join_names(f"{name} (seed + {seed_offset})" for name, seed_offset in missing)
        console.info(f"clean twins to train: {titles}")
    return (
        {key: model for key, model in twins.items() if model is not None},
        {
            (name, seed_offset): VictimSpec(name, experiment.recipes.with_seed_offset(seed_offset), None)
            for name, seed_offset in missing
        },
    )


def _evaluate_twin(experiment: PoisonExperiment, model: nn.Module) -> CleanTwin:
    on_device = model.to(device())
    return CleanTwin(on_device, _predictions(experiment, on_device))


def _predictions(experiment: PoisonExperiment, model: nn.Module) -> Predictions:
    """Loads or computes a model's predictions on the test images."""
    return load_or_compute(
        experiment.recipes.checkpoint_dir,
        "predictions",
        (model_fingerprint(model),),
        lambda: Checkpoint(vars(metrics.predict_clean_and_robust(model, experiment.evaluation_inputs)), {}),
        lambda checkpoint: Predictions(**checkpoint.tensors),
    )


def _twin_name(victim: str) -> str:
    """Returns the victim's name without poison: that of a mixture does not depend on which phases are poisoned."""
    return MIXTURE if victim == JOINT_ONLY else victim


def _measure(
    experiment: PoisonExperiment,
    poison_run: PoisonRun,
    spec: VictimSpec,
    model: nn.Module,
    twins: Mapping[TwinKey, CleanTwin],
    defence: str,
) -> Row:
    twin = twins[_twin_name(spec.victim), poison_run.seed_offset]
    victim = model.to(device())
    pair = VictimTwinPair(victim, twin.model, _predictions(experiment, victim), twin.predictions)
    experts: Sequence[str] = experiment.recipes.joint.experts if is_mixture(spec.victim) else ()
    values = metrics.compute_metrics(pair, poison_run.poisoned, experiment.evaluation_inputs, experts)
    amounts = _poison_amounts(poison_run)
    return Row(spec.victim, poison_run.rate, poison_run.seed_offset, poison_run.trial, defence, values, amounts)


def _poison_amounts(poison_run: PoisonRun) -> dict[str, Any]:
    """Returns how much was poisoned: the number of images, and its share of the set and of the target class."""
    poisoned = poison_run.poisoned
    total, target = len(poisoned.labels), poisoned.goal.target
    amounts: dict[str, Any] = {
        "n_poison": len(poisoned.rows),
        "rate_of": poisoned.rate_of,
        "share_of_set": round(len(poisoned.rows) / total, 6),
        "sha256": poison_run.sha256,
    }
    if target is not None:
        of_class = int((poisoned.labels == target).sum())
        poisoned_of_class = int((poisoned.labels[poisoned.rows] == target).sum())
        amounts["share_of_target_class"] = round(poisoned_of_class / of_class, 6)
    return amounts


def _run_defences(
    experiment: PoisonExperiment,
    folder: Path,
    victims: Sequence[tuple[PoisonRun, VictimSpec]],
    trained: Sequence[TrainingResult],
    twins: Mapping[TwinKey, CleanTwin],
) -> list[Row]:
    """Retrains every victim without the images that each defence flags, and measures the retrained victims."""
    to_retrain, rates = [], []
    for (poison_run, spec), result in zip(victims, trained, strict=True):
        for name in experiment.study.defences:
            flagged = _flag_images(experiment, poison_run, result.model, name, experiment.common.defence[name])
            kept = _remove_flagged(_train_split(experiment, poison_run.poisoned), flagged, name)
            to_retrain.append((poison_run, VictimSpec(spec.victim, spec.recipes, kept), name))
            rates.append(metrics.detection_rates(flagged, poison_run.poisoned.is_poison))
    rows = []
    retrained = train_victims([spec for _, spec, _ in to_retrain])
    for (poison_run, spec, name), detection_rates, result in zip(to_retrain, rates, retrained, strict=True):
        _save_victim(experiment, folder, poison_run, spec, result, name)
        row = _measure(experiment, poison_run, spec, result.model, twins, name)
        row.metrics.update(detection_rates)
        rows.append(row)
        console.info(report.summary_line(row))
    return rows


def _flag_images(
    experiment: PoisonExperiment, poison_run: PoisonRun, victim: nn.Module, name: str, settings: AnyDetector
) -> torch.Tensor:
    """Loads or computes which training images (N,) a detector flags."""
    stream = generator(experiment.recipes.seed + poison_run.seed_offset, "defence", name, poison_run.title)
    train, validation = _train_split(experiment, poison_run.poisoned), experiment.data["validation"]
    inputs = DetectorInputs(victim.to(device()), train, validation, stream)
    return load_or_compute(
        experiment.recipes.checkpoint_dir,
        "flagged",
        (name, poison_run.title, poison_run.sha256, model_fingerprint(victim)),
        lambda: Checkpoint({"flagged": flag_poison(inputs, settings, poison_run.poisoned.is_poison)}, {}),
        lambda checkpoint: checkpoint.tensors["flagged"],
    )


def _remove_flagged(train: Split, flagged_N: torch.Tensor, name: str) -> Split:
    """Returns the split without the flagged images. Raises UserError when no image of a class would remain."""
    kept = ~flagged_N
    removed = sorted(set(train.labels.tolist()) - set(train.labels[kept].tolist()))
    if removed:
        raise UserError(f"defence '{name}' removes all training images of class {removed[0]}; let it remove fewer")
    return Split(train.images[kept], train.labels[kept], train.index[kept])


def _save_victim(
    experiment: PoisonExperiment,
    folder: Path,
    poison_run: PoisonRun,
    spec: VictimSpec,
    result: TrainingResult,
    defence: str,
) -> None:
    recipes = spec.recipes
    classifiers.save(
        folder / poison_run.title / f"{spec.victim}{'-' + defence if defence else ''}.safetensors",
        result.model,
        recipes.architecture(spec.victim),
        experiment.data.facts,
        params={"study": experiment.study.model_dump(mode="json"), "defence": defence, "epsilon": recipes.epsilon},
        inputs={"dataset": experiment.data.sha256, "poisoned set": poison_run.sha256},
        seed=recipes.run_seed,
        metrics={"validation": result.kept, "alarms": result.alarms},
        seconds=result.seconds,
    )
    for alarm in result.alarms:
        console.warn(alarm)


def preview_image(experiment: PoisonExperiment, poisoned: PoisonedSet) -> bytes | None:
    """Returns a PNG of clean and poisoned images, None for attacks that change labels only."""
    if poisoned.trigger is not None:
        clean = experiment.evaluation_inputs.split.images
        return preview.example_grid(clean, poisoned.trigger.stamp(clean))
    before = experiment.data["train"].images[poisoned.rows]
    after = poisoned.images[poisoned.rows]
    return None if torch.equal(before, after) else preview.example_grid(before, after)

"""One extraction study: queries the victims, trains surrogates on the answers, and measures surrogates and queries.

Shapes: N images, K classes.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from advmoe.core import console, files, paths, user_code
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import PlainArchitecture
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback
from advmoe.runtime.checkpoints.workdir import open_workdir
from advmoe.runtime.machine import generator
from advmoe.runtime.parallel import parallel_map
from advmoe.threats.experiment import OutputPaths, load_or_compute, print_outputs, resumable_loop
from advmoe.threats.extraction import metrics, prada, query_pools, report, surrogate, transfer_set, victims
from advmoe.threats.extraction.config import Common, Study
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.metrics import EvaluationInputs, SurrogateAnswers, VictimAnswers
from advmoe.threats.extraction.oracle import Oracle, format_answers
from advmoe.threats.extraction.query_pools import AnyPool, Candidates
from advmoe.threats.extraction.registry import run_extraction
from advmoe.threats.extraction.report import Row
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.training.job import TrainingResult
from advmoe.training.job_key import model_fingerprint


@dataclass(frozen=True)
class ExtractionExperiment:
    """All inputs of a study.

    `weights`: of an external victim; `folder`: for transfer sets and surrogates; `checkpoint_dir`: for resume, see
    `advmoe.runtime.checkpoints.workdir`. `run_experiment` sets both folders.
    """

    name: str
    study: Study
    common: Common
    seed: int
    epsilon: float
    weights: Path | None
    folder: Path = Path()
    checkpoint_dir: Path | None = None


def run_experiment(experiment: ExtractionExperiment, outputs: OutputPaths) -> None:
    """Runs a study, writes its results and prints them; continues from the checkpoints of an interrupted run.

    Raises UserError for a study that cannot run on this data or with these victims.
    """
    facts = (replace(experiment, folder=Path()), _dataset().sha256)  # the folder does not affect the results
    with open_workdir(f"extract-{experiment.name}", *facts) as checkpoint_dir:
        _run_and_write(replace(experiment, folder=outputs.models, checkpoint_dir=checkpoint_dir), outputs)


def _run_and_write(experiment: ExtractionExperiment, outputs: OutputPaths) -> None:
    rows = run(experiment)
    images = len(_dataset()["test"].first(experiment.common.images))
    about = {"attack": experiment.study.attack.kind, "epsilon": experiment.epsilon, "images": images}
    report.write(rows, about, outputs.metrics, outputs.runs, outputs.plots / "curve.csv")
    report.show(experiment.name, rows, images)
    print_outputs(outputs, outputs.plots, outputs.models)


def run(experiment: ExtractionExperiment) -> list[Row]:
    """Runs a study on all victims and seeds and returns its results; writes transfer sets and surrogates."""
    known = experiment.common.surrogates
    unknown = [name for name in experiment.study.surrogates if name not in known]
    if unknown:
        raise UserError(f"surrogate '{unknown[0]}' is not known; there are {files.join_names(known)}")
    _check_victims(experiment)
    jobs = [(victim, seed_offset) for victim in experiment.study.victims for seed_offset in experiment.study.seeds]
    run_victim = partial(_run_victim, experiment)
    # the cache of a user's function belongs to one process; a second one would send the same, possibly paid, queries
    has_function = any(user_code.is_code_reference(name) for name in experiment.study.victims)
    results = [run_victim(job) for job in jobs] if has_function else parallel_map(run_victim, jobs)
    return [row for rows in results for row in rows]


def _check_victims(experiment: ExtractionExperiment) -> None:
    """Raises UserError for a missing victim and for two victims with the same short name, before the first query."""
    names = [victims.load(name, experiment.weights, _dataset().facts).name for name in experiment.study.victims]
    for name, short_name in zip(experiment.study.victims, names, strict=True):
        if names.count(short_name) > 1:
            raise UserError(f"victim '{name}': there are two called '{short_name}'; run them one after the other")


@lru_cache(maxsize=1)
def _dataset() -> Dataset:
    return dataset.load(paths.DATASET)


def _run_victim(experiment: ExtractionExperiment, job: tuple[str, int]) -> list[Row]:
    """Runs one victim and seed: all queries in every answer mode, the controls, then every budget and surrogate."""
    extraction_run = ExtractionRun(experiment, *job, _dataset())
    victim = extraction_run.victim
    if victim.cache is not None:
        queries = extraction_run.evaluation_queries
        console.info(f"{victim.name}: the evaluation sends up to {queries} queries in addition to the budget")
    transfer_results = [extraction_run.query_victim(mode) for mode in experiment.study.answers]
    rows = extraction_run.train_controls()
    for result in transfer_results:
        rows += extraction_run.train_surrogates(result)
    if victim.cache is not None:
        cached = len(victim.cache.answers)
        console.info(f"{victim.name}: {cached} answers, evaluation included, are cached in {victim.cache.folder}/")
    return rows


def _evaluation_inputs(experiment: ExtractionExperiment, data: Dataset) -> EvaluationInputs:
    common, seed = experiment.common, experiment.seed
    noise = query_pools.uniform_noise(common.noise, data.facts, generator(seed, "extract", "noise"))
    split = data["test"].first(common.images)
    return EvaluationInputs(split, noise, common.robust, experiment.epsilon, seed, common.recipe.precision)


@dataclass(frozen=True)
class TransferResult:
    """The transfer set of one answer mode, with the stem of its file name and its content hash."""

    mode: str
    title: str
    transfer_set: TransferSet
    sha256: str


class ExtractionRun:
    """The study's attack on one victim under one seed; `victim_name` is the name in the study."""

    def __init__(self, experiment: ExtractionExperiment, victim_name: str, seed_offset: int, data: Dataset) -> None:
        self.experiment, self.victim_name, self.seed_offset, self.data = experiment, victim_name, seed_offset, data
        self.victim = victims.load(victim_name, experiment.weights, data.facts)
        self.inputs = _evaluation_inputs(experiment, data)
        self.run_seed = experiment.seed + seed_offset
        self.controls: dict[str, SurrogateAnswers] = {}

    @cached_property
    def victim_answers(self) -> VictimAnswers:
        """The victim's answers to the evaluation inputs."""
        return load_or_compute(
            self.experiment.checkpoint_dir,
            "victim-predictions",
            (self.victim.identity,),
            lambda: metrics.to_checkpoint(metrics.victim_answers(self.victim, self.inputs)),
            lambda checkpoint: metrics.from_checkpoint(checkpoint, VictimAnswers),
        )

    def _surrogate_answers(self, network: nn.Module) -> SurrogateAnswers:
        """Loads or computes a surrogate's answers to the evaluation inputs."""
        compute = partial(metrics.surrogate_answers, network, self.victim, self.victim_answers, self.inputs)
        return load_or_compute(
            self.experiment.checkpoint_dir,
            "surrogate-predictions",
            (self.victim.identity, model_fingerprint(network)),
            lambda: metrics.to_checkpoint(compute()),
            lambda checkpoint: metrics.from_checkpoint(checkpoint, SurrogateAnswers),
        )

    def train_controls(self) -> list[Row]:
        """Trains control surrogates on the attacker's own images and their true labels, without any query."""
        labelled = transfer_set.from_labels(query_pools.in_distribution(self.data), self.data.facts.classes)
        rows = []
        for name in self.experiment.study.surrogates:
            trained = self._train(name, labelled)
            self.controls[name] = self._surrogate_answers(trained.model)
            # controls do not depend on the victim, so they are saved for the first victim only
            if self.victim_name == self.experiment.study.victims[0]:
                self._save_surrogate(f"control-seed-{self.seed_offset}/{name}", name, trained, {})
            values = metrics.compute_metrics(self.controls[name], None, self.victim_answers, self.inputs)
            rows.append(Row(self.victim.name, report.CONTROL, name, 0, self.seed_offset, values, {}))
        return rows

    @property
    def evaluation_queries(self) -> int:
        """Maximum number of images that the victim classifies for the evaluation, beyond the attacker's queries."""
        study = self.experiment.study
        surrogates = len(study.surrogates) * (1 + len(study.answers) * len(study.budgets))
        return len(self.inputs.split) * (2 + surrogates) + len(self.inputs.noise)

    def query_victim(self, mode: str) -> TransferResult:
        """Runs the attack with the largest budget and writes its transfer set, before any surrogate is trained."""
        experiment, started = self.experiment, time.monotonic()
        oracle = Oracle(self.victim.query, mode, max(experiment.study.budgets))
        queried = run_extraction(experiment.study.attack, self._attack_context(oracle))
        assert len(queried.images) == oracle.used, "a query that is not in the transfer set"
        title = f"{self.victim.name.replace('/', '-')}-{mode}-seed-{self.seed_offset}"
        sha256 = transfer_set.save(
            experiment.folder / f"{title}.safetensors",
            queried,
            oracle.query_log,
            about={"attack": experiment.study.attack.kind, "answers": mode, "victim": self.victim.name},
            params=experiment.study.model_dump(mode="json"),
            inputs={"dataset": self.data.sha256, "victim": self.victim.identity},
            seed=self.run_seed,
            seconds=time.monotonic() - started,
        )
        return TransferResult(mode, title, queried, sha256)

    def train_surrogates(self, result: TransferResult) -> list[Row]:
        """Trains every surrogate from scratch at every budget and measures it."""
        study = self.experiment.study
        detection, rows = self._query_stats(result.transfer_set, result.mode), []
        for budget in sorted(study.budgets):
            within_budget = result.transfer_set.within_budget(budget)
            for name in study.surrogates:
                trained = self._train(name, within_budget)
                self._save_surrogate(f"{result.title}/{name}-{budget}", name, trained, {"transfer set": result.sha256})
                answers = self._surrogate_answers(trained.model)
                values = metrics.compute_metrics(answers, self.controls[name], self.victim_answers, self.inputs)
                query_stats = {"queries_used": len(within_budget.images), "sha256": result.sha256, **detection}
                if query_stats["alarm_after"] is not None and query_stats["alarm_after"] > len(within_budget.images):
                    query_stats["alarm_after"] = None  # the alarm is raised at a larger budget only
                rows.append(Row(self.victim.name, result.mode, name, budget, self.seed_offset, values, query_stats))
                console.info(report.summary_line(rows[-1]))
        return rows

    def _attack_context(self, oracle: Oracle) -> AttackContext:
        first = self.experiment.study.surrogates[0]
        backbone, kind = self.experiment.common.surrogates[first], self.experiment.study.attack.kind
        return AttackContext(
            oracle=oracle,
            load_pool=self._load_pool,
            train_surrogate=lambda queried: self._train(first, queried).model,
            build_surrogate=lambda: surrogate.build(backbone, self.data, self.run_seed, kind, "fresh"),
            stream=generator(self.run_seed, "extract", kind),
            facts=self.data.facts,
            checkpointing=partial(self._checkpointing, oracle),
        )

    def _checkpointing(self, oracle: Oracle, work: Resumable) -> AbstractContextManager[StepCallback]:
        """Makes an attack resumable; the checkpoint belongs to this victim, answer mode, budget and seed."""
        title = f"{self.experiment.study.attack.kind} on {self.victim.name}"
        facts = (self.victim.identity, oracle.mode, oracle.budget, self.run_seed)
        return resumable_loop(self.experiment.checkpoint_dir, "attack", facts, work, title)

    def _load_pool(self, pool: AnyPool) -> Candidates:
        # the seed depends on the pool alone, so that all attacks, victims and answer modes use the same images
        return query_pools.load_pool(pool, self.data, generator(self.run_seed, "extract", "pool", pool.kind))

    def _train(self, name: str, queried: TransferSet) -> TrainingResult:
        experiment = self.experiment
        return surrogate.train(
            name,
            experiment.common.surrogates[name],
            queried,
            self.data,
            experiment.common,
            seed=self.run_seed,
            epsilon=experiment.epsilon,
            checkpoint_dir=experiment.checkpoint_dir,
        )

    def _save_surrogate(self, title: str, name: str, trained: TrainingResult, inputs: dict[str, str]) -> None:
        study, common = self.experiment.study, self.experiment.common
        classifiers.save(
            self.experiment.folder / f"{title}.safetensors",
            trained.model,
            PlainArchitecture(kind="plain", backbone=common.surrogates[name]),
            self.data.facts,
            params={"study": study.model_dump(mode="json"), "recipe": common.recipe.model_dump(mode="json")},
            inputs={"dataset": self.data.sha256, **inputs},
            seed=self.run_seed,
            metrics={},
            seconds=trained.seconds,
        )

    def _query_stats(self, queried: TransferSet, mode: str) -> dict[str, Any]:
        """Returns after how many queries the detector raises an alarm, for the attacker and for a benign user who
        queries the test images, and the costs of the answer mode for that user.
        """
        answers = format_answers(self.victim_answers.probabilities, mode)
        detector, split = self.experiment.common.detector, self.inputs.split
        return {
            "alarm_after": prada.queries_until_alarm(queried.images, queried.answers.argmax(1), detector),
            "honest_alarm_after": prada.queries_until_alarm(split.images, answers.argmax(1), detector),
            "honest_queries": len(split),
            **metrics.benign_user_cost(self.victim_answers.probabilities, answers, split.labels),
        }

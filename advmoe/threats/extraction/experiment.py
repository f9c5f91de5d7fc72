"""One extraction attack tried on its victims: ask, write down, train, measure, look for traces.

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
from advmoe.models.classifiers import Plain
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback, checkpointing
from advmoe.runtime.machine import generator
from advmoe.runtime.parallel import parallel_map
from advmoe.threats.extraction import metrics, prada, query_pools, report, surrogate, transfer_set, victims
from advmoe.threats.extraction.config import Common, Study
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.metrics import Exam, SurrogateAnswers, VictimAnswers
from advmoe.threats.extraction.oracle import Oracle, told_as
from advmoe.threats.extraction.query_pools import AnyPool, Candidates
from advmoe.threats.extraction.registry import steal
from advmoe.threats.extraction.report import Row
from advmoe.threats.extraction.transfer_set import TransferSet
from advmoe.training.job_key import model_fingerprint
from advmoe.training.trainer import TrainingResult


@dataclass(frozen=True)
class ExtractionExperiment:
    """Everything that a study starts from. `weights`: of a stranger; `folder`: for transfer sets and surrogates;
    `shelf`: for surrogates until the study is on record, see `advmoe.runtime.checkpoints.workdir`.
    """

    name: str
    study: Study
    common: Common
    seed: int
    epsilon: float
    weights: Path | None
    folder: Path
    shelf: Path | None = None


@dataclass(frozen=True)
class OutputPaths:
    """Where the results of a study go: the headline, every run, and plots."""

    metrics: Path
    runs: Path
    plots: Path


def run_experiment(case: ExtractionExperiment, places: OutputPaths) -> None:
    """Run a study, write it down and show it; what was done before a kill is taken over.

    Raises UserError for what cannot be.
    """
    question = replace(case, folder=Path())  # where the answers go changes none of them
    with workdir.open_workdir(f"extract-{case.name}", question, _data().sha256) as shelf:
        _conduct(replace(case, shelf=shelf), places)


def _conduct(case: ExtractionExperiment, places: OutputPaths) -> None:
    rows = run(case)
    images = len(_data()["test"].first(case.common.images))
    about = {"attack": case.study.attack.kind, "epsilon": case.epsilon, "images": images}
    report.write(rows, about, places.metrics, places.runs, places.plots / "curve.csv")
    report.show(case.name, rows, images)
    console.say(f"numbers: {places.metrics}, {places.runs}   plots: {places.plots}/   models: {case.folder}/")


def run(case: ExtractionExperiment) -> list[Row]:
    """All victims and seeds, two at a time where there are cores for it."""
    strangers = [name for name in case.study.surrogates if name not in case.common.surrogates]
    if strangers:
        raise UserError(f"surrogate '{strangers[0]}' is not known; there are {files.names(case.common.surrogates)}")
    _check_victims(case)
    jobs = [(victim, added) for victim in case.study.victims for added in case.study.seeds]
    campaign = partial(_campaign, case)
    # answers that cost money are remembered by the process that got them: no other may ask beside it
    costly = any(user_code.names_code(name) for name in case.study.victims)
    return [row for rows in (map(campaign, jobs) if costly else parallel_map(campaign, jobs)) for row in rows]


def _check_victims(case: ExtractionExperiment) -> None:
    """Raises UserError for a victim that is not there, and for two of one name, before any of them is asked."""
    names = [victims.load(name, case.weights, _data().facts).name for name in case.study.victims]
    for name, shown in zip(case.study.victims, names, strict=True):
        if names.count(shown) > 1:
            raise UserError(f"victim '{name}': there are two called '{shown}'; ask them one after the other")


@lru_cache(maxsize=1)
def _data() -> Dataset:
    return dataset.load(paths.DATASET)


def _campaign(case: ExtractionExperiment, job: tuple[str, int]) -> list[Row]:
    """One victim and seed: all queries in every answer mode, then the control, then every budget and surrogate."""
    campaign = ExtractionRun(case, *job, _data())
    victim = campaign.victim
    if victim.paid is not None:
        console.say(f"{victim.name}: beside the budget, the exam asks up to {campaign.exam_questions} images")
    stolen = [campaign.ask(mode) for mode in case.study.answers]
    rows = campaign.controls()
    for loot in stolen:
        rows += campaign.learn(loot)
    if victim.paid is not None:
        kept = len(victim.paid.answers)
        console.say(f"{victim.name}: {kept} answers, those to the exam included, are kept in {victim.paid.folder}/")
    return rows


def _exam(case: ExtractionExperiment, data: Dataset) -> Exam:
    common = case.common
    noise = query_pools.uniform_noise(common.noise, data.facts, generator(case.seed, "extract", "noise"))
    split = data["test"].first(common.images)
    return Exam(split, noise, common.robust, case.epsilon, case.seed, common.recipe.precision)


@dataclass(frozen=True)
class TransferResult:
    """What one oracle answered: in which mode, under which name it lies on disk, and its content hash there."""

    mode: str
    title: str
    found: TransferSet
    sha256: str


class ExtractionRun:
    """One attacker against one victim."""

    def __init__(self, case: ExtractionExperiment, asked_for: str, added: int, data: Dataset) -> None:
        self.case, self.asked_for, self.added, self.data = case, asked_for, added, data
        self.victim = victims.load(asked_for, case.weights, data.facts)
        self.exam = _exam(case, data)
        self.run_seed = case.seed + added
        self.control: dict[str, SurrogateAnswers] = {}

    @cached_property
    def known(self) -> VictimAnswers:
        """The victim's answers to the exam."""
        file = workdir.checkpoint_path(self.case.shelf, "sheet", self.victim.identity)
        return storage.load_or_compute(
            file,
            lambda: metrics.to_keep(metrics.victim_answers(self.victim, self.exam)),
            lambda found: metrics.as_kept(found, VictimAnswers),
        )

    def _examined(self, surrogate: nn.Module) -> SurrogateAnswers:
        """A surrogate's answers to it; what was asked before a kill is not asked again."""
        file = workdir.checkpoint_path(self.case.shelf, "copy", self.victim.identity, model_fingerprint(surrogate))
        find = partial(metrics.examine, surrogate, self.victim, self.known, self.exam)
        return storage.load_or_compute(
            file, lambda: metrics.to_keep(find()), lambda found: metrics.as_kept(found, SurrogateAnswers)
        )

    def controls(self) -> list[Row]:
        """Surrogates trained on the attacker's own images and their true labels: the victim was never asked."""
        own = transfer_set.labelled(query_pools.in_distribution(self.data), self.data.facts.classes)
        rows = []
        for name in self.case.study.surrogates:
            trained = self._train(name, own)
            self.control[name] = self._examined(trained.model)
            # it knows nothing of the victim: the same for all of them, and one is enough to write it
            if self.asked_for == self.case.study.victims[0]:
                self._save(f"control-seed-{self.added}/{name}", name, trained, {})
            found = metrics.numbers(self.control[name], None, self.known, self.exam)
            rows.append(Row(self.victim.name, report.CONTROL, name, 0, self.added, found, {}))
        return rows

    @property
    def exam_questions(self) -> int:
        """How many images the victim is asked about to measure what was stolen."""
        study = self.case.study
        copies = len(study.surrogates) * (1 + len(study.answers) * len(study.budgets))
        return len(self.exam.split) * (2 + copies) + len(self.exam.noise)

    def ask(self, mode: str) -> TransferResult:
        """Ask once, up to the largest budget, and write it down before anything is learned from it."""
        case, started = self.case, time.monotonic()
        oracle = Oracle(self.victim.ask, mode, max(case.study.budgets))
        found = steal(case.study.attack, self._tools(oracle))
        assert len(found.images) == oracle.used, "a query that is not in the transfer set"
        title = f"{self.victim.name.replace('/', '-')}-{mode}-seed-{self.added}"
        sha256 = transfer_set.save(
            case.folder / f"{title}.safetensors",
            found,
            oracle.asked,
            about={"attack": case.study.attack.kind, "answers": mode, "victim": self.victim.name},
            params=case.study.model_dump(mode="json"),
            inputs={"dataset": self.data.sha256, "victim": self.victim.identity},
            seed=self.run_seed,
            seconds=time.monotonic() - started,
        )
        return TransferResult(mode, title, found, sha256)

    def learn(self, loot: TransferResult) -> list[Row]:
        """At every budget every surrogate from scratch."""
        study = self.case.study
        traces, rows = self._traces(loot.found, loot.mode), []
        for budget in sorted(study.budgets):
            bought = loot.found.within(budget)
            for name in study.surrogates:
                trained = self._train(name, bought)
                self._save(f"{loot.title}/{name}-{budget}", name, trained, {"transfer set": loot.sha256})
                copy = self._examined(trained.model)
                numbers = metrics.numbers(copy, self.control[name], self.known, self.exam)
                amounts = {"queries_used": len(bought.images), "sha256": loot.sha256, **traces}
                if amounts["alarm_after"] is not None and amounts["alarm_after"] > len(bought.images):
                    amounts["alarm_after"] = None  # only a larger budget would have been noticed
                rows.append(Row(self.victim.name, loot.mode, name, budget, self.added, numbers, amounts))
                console.say(report.sentence(rows[-1]))
        return rows

    def _tools(self, oracle: Oracle) -> AttackContext:
        first = self.case.study.surrogates[0]
        kind = self.case.study.attack.kind
        return AttackContext(
            oracle=oracle,
            gather=self._gather,
            learn=lambda known: self._train(first, known).model,
            fresh=lambda: surrogate.fresh(self.case.common.surrogates[first], self.data, self.run_seed, kind, "fresh"),
            stream=generator(self.run_seed, "extract", kind),
            facts=self.data.facts,
            keep=partial(self._keep, oracle),
        )

    def _keep(self, oracle: Oracle, work: Resumable) -> AbstractContextManager[StepCallback]:
        """Beside what determines the study: whom exactly it asks, and how."""
        title = f"{self.case.study.attack.kind} on {self.victim.name}"
        facts = (self.victim.identity, oracle.mode, oracle.budget, self.run_seed)
        return checkpointing(work, title, workdir.checkpoint_path(self.case.shelf, "attack", *facts))

    def _gather(self, pool: AnyPool) -> Candidates:
        # the stream is named after the pool alone: every attack, victim and answer mode meets the same images
        return query_pools.gather(pool, self.data, generator(self.run_seed, "extract", "pool", pool.kind))

    def _train(self, name: str, known: TransferSet) -> TrainingResult:
        case = self.case
        return surrogate.train(
            name,
            case.common.surrogates[name],
            known,
            self.data,
            case.common,
            seed=self.run_seed,
            epsilon=case.epsilon,
            shelf=case.shelf,
        )

    def _save(self, title: str, name: str, trained: TrainingResult, inputs: dict[str, str]) -> None:
        common = self.case.common
        classifiers.save(
            self.case.folder / f"{title}.safetensors",
            trained.model,
            Plain(kind="plain", backbone=common.surrogates[name]),
            self.data.facts,
            params={"study": self.case.study.model_dump(mode="json"), "recipe": common.recipe.model_dump(mode="json")},
            inputs={"dataset": self.data.sha256, **inputs},
            seed=self.run_seed,
            metrics={},
            seconds=trained.seconds,
        )

    def _traces(self, found: TransferSet, mode: str) -> dict[str, Any]:
        """After how many queries the detector notices the thief, and an honest user who asks about the test images; and
        what the answer mode costs that user.
        """
        told = told_as(self.known.probabilities, mode)
        detector, split = self.case.common.detector, self.exam.split
        return {
            "alarm_after": prada.alarm_after(found.images, found.answers.argmax(1), detector),
            "honest_alarm_after": prada.alarm_after(split.images, told.argmax(1), detector),
            "honest_queries": len(split),
            **metrics.cost_to_honest(self.known.probabilities, told, split.labels),
        }

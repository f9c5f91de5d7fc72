"""evaluate: how the mixture, its parts and the plain networks do on the test split, clean and attacked, and whether
these numbers may be believed.

Reads `seed`, `epsilon`, `evaluate`, the data set, the mixture, the pre-trained experts and the baselines. Writes
metrics/evaluate.json (the headline), metrics/verdict.json (the checks), metrics/evaluate/ (one file per model),
metrics/decisions/ (who was right, image by image), plots/evaluate/ and, with the adversarial images,
artifacts/evaluate/adversarial.safetensors.

Shapes: N images, E experts.
"""

import time
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from advmoe.attacks.ball import LInf
from advmoe.core import artifacts, console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, Seed, load_section
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split
from advmoe.evaluation import gate_report, plots, serialise, summary, verdict
from advmoe.evaluation.checks.base import CheckContext
from advmoe.evaluation.checks.consistency import content_hashes
from advmoe.evaluation.config import EvaluateSection, fitting, robustness_curve
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget, clear_resume_state, evaluate
from advmoe.evaluation.minimal_perturbation import minimal_epsilons
from advmoe.evaluation.summary import ModelResult
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier, Mixture
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import distributed
from advmoe.runtime.machine import device, evaluation_seed
from advmoe.runtime.parallel import parallel_map
from advmoe.statistics import decisions
from advmoe.statistics.decisions import WORST
from advmoe.statistics.paired_tests import compare


@dataclass(frozen=True)
class Subject:
    """A model of the pipeline. `full`: it meets every attack and is judged; the others meet the experts' attacks."""

    name: str
    model: nn.Module
    full: bool = False


@dataclass
class Inputs:
    """What this stage reads."""

    seed: int
    epsilon: float
    settings: EvaluateSection
    data: Dataset
    mixture: Classifier
    baselines: dict[str, Classifier]
    experts: dict[str, Classifier]

    @classmethod
    @lru_cache(maxsize=1)  # a worker evaluates many models
    def read(cls) -> "Inputs":
        """Raises UserError for what is missing or does not belong together."""
        settings = load_section("evaluate", EvaluateSection)
        data, mixture = dataset.load(paths.DATASET), classifiers.load(paths.MIXTURE)
        names = _architecture(mixture).experts
        inputs = cls(
            seed=load_section("seed", Seed),
            epsilon=load_section("epsilon", Epsilon),
            settings=settings,
            data=data,
            mixture=mixture,
            baselines={name: classifiers.load(paths.artifact("baseline", name)) for name in settings.baselines},
            experts={name: classifiers.load(paths.artifact("pretrain", name)) for name in names},
        )
        for name, source in {summary.MIXTURE: mixture, **inputs.baselines, **inputs.experts}.items():
            if source.header.inputs.get("dataset") != data.sha256:
                raise UserError(f"{name}: trained on other data than {paths.DATASET}; run `dvc repro`")
        return inputs

    @property
    def split(self) -> Split:
        """The images to evaluate on."""
        return self.data["test"].first(self.settings.limit)

    @property
    def terms(self) -> EvaluationConfig:
        """The terms to evaluate on."""
        return self.settings.terms(LInf(self.epsilon), evaluation_seed(self.seed))

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the gate's order."""
        return _architecture(self.mixture).experts

    def subjects(self) -> dict[str, Subject]:
        """Every model to evaluate, the dearest first."""
        joint = self.mixture.model
        assert isinstance(joint, MixtureOfExperts)
        pretrained = [expert.model for expert in self.experts.values()]
        before = classifiers.build_mixture(_architecture(self.mixture), self.mixture.about.facts, pretrained, 0)
        plain = self.baselines.items()
        found = [
            Subject(summary.MIXTURE, joint, full=True),
            Subject(summary.UNIFORM, classifiers.uniform_mixture(joint)),
            Subject(summary.BEFORE, before),
            *(Subject(summary.BASELINE + name, baseline.model, full=True) for name, baseline in plain),
            *(Subject(summary.PRETRAINED + name, expert.model) for name, expert in self.experts.items()),
            *(Subject(summary.JOINT + name, expert) for name, expert in zip(self.names, joint.experts, strict=True)),
        ]
        return {subject.name: subject for subject in found}


def run() -> None:
    """Evaluate everything the pipeline trained. Several processes share the images; the first judges and writes."""
    started = time.monotonic()
    Inputs.read.cache_clear()
    inputs = Inputs.read()
    names = list(inputs.subjects())
    found = dict(zip(names, parallel_map(evaluate_one, names), strict=True))
    if not distributed.is_rank0():
        return
    _compare(found, inputs.seed)
    _write(found, inputs)
    _write_examples(found, inputs, time.monotonic() - started)
    for result in found.values():
        clear_resume_state(result.target, result.attacks, inputs.terms)
    console.say("`advmoe results` shows all results")


def _architecture(mixture: Classifier) -> Mixture:
    assert isinstance(mixture.about.architecture, Mixture)
    return mixture.about.architecture


def evaluate_one(name: str) -> ModelResult:
    """Evaluate one model of the pipeline; in a process of its own, where there are cores for that."""
    inputs, place = Inputs.read(), device()
    settings, split, subject = inputs.settings, inputs.split, inputs.subjects()[name]
    sources = {summary.BASELINE + each: baseline.model.to(place) for each, baseline in inputs.baselines.items()}
    target = EvaluationTarget(
        name=name,
        model=subject.model.to(place),
        images=split.pixels().to(place),
        labels=split.labels.to(place),
        sources={each: model for each, model in sources.items() if each != name},
    )
    wanted = settings.full() if subject.full else {each: settings.attacks[each] for each in settings.experts}
    attacks = fitting(wanted, target.has_gate, target.sources)
    result = ModelResult(target, attacks, evaluate(target, attacks, inputs.terms))
    if subject.full:
        _judge(result, inputs)
    class_names = inputs.data.facts.class_names
    result.numbers = serialise.numbers(result.measured, attacks, inputs.terms, class_names, result.verdict)
    console.say(f"{name}: " + ", ".join(f"{kind} {share}" for kind, share in result.measured.shares().items()))
    return result


def _judge(result: ModelResult, inputs: Inputs) -> None:
    settings, terms, target = inputs.settings, inputs.terms, result.target
    training = frozenset(content_hashes(inputs.data["train"].images))
    case = CheckContext(target, result.attacks, result.measured, terms, settings.checks, training)
    if distributed.is_rank0():
        result.verdict = verdict.judge(case)
    result.curve = dict(robustness_curve(target, settings.grid, terms))
    result.minimal = minimal_epsilons(target, settings.minimal, result.measured, terms)


def _compare(found: dict[str, ModelResult], seed: int) -> None:
    """The mixture against every other model, on the same images.

    Judged models are compared in the worst case of all that each met: to leave gate-aware attacks out against a plain
    network would flatter the mixture. The others are compared over the attacks that both met.
    """
    mixture = found[summary.MIXTURE]
    for name, other in found.items():
        if other is mixture:
            continue
        met = [attack for attack in other.measured.outcomes if attack in mixture.measured.outcomes]
        left = mixture.measured.correct[WORST] if other.verdict else mixture.measured.over(met)
        mixture.against[name] = compare(left, other.measured.correct[WORST], seed).as_dict()


def _write(found: dict[str, ModelResult], inputs: Inputs) -> None:
    mixture = found[summary.MIXTURE]
    weights = gate_report.weights(mixture.target, mixture.measured, inputs.names)
    mixture.extra = {"gate": weights, "oracle_routing": gate_report.oracle_routing(mixture.target, mixture.measured)}
    for name, result in found.items():
        files.write_json(summary.report_path(name), summary.report(name, result, inputs.epsilon))
        files.write_csv(decisions.path(name), serialise.decision_rows(result.measured, inputs.split))
    files.write_json(paths.SUMMARY, summary.summary(found, inputs.epsilon))
    judged = {name: result.verdict for name, result in found.items()}
    files.write_json(paths.VERDICT, {name: judgement.as_dict() for name, judgement in judged.items() if judgement})
    plots.write(found, weights, inputs.data.facts.class_names)


def _write_examples(found: dict[str, ModelResult], inputs: Inputs, seconds: float) -> None:
    split = inputs.split
    tensors: dict[str, Tensor] = {"images": split.images, "labels": split.labels, "index": split.index}
    timings: dict[str, float] = {}
    for name, result in found.items():
        # the images of eighteen experts would fill the disk, and nobody asks for them
        tensors |= serialise.decisions(name, result.measured, with_images=result.verdict is not None)
        timings |= serialise.timings(name, result.measured)
    sources = {summary.MIXTURE: inputs.mixture, **inputs.baselines}
    artifacts.save(
        paths.ADVERSARIAL,
        "adversarial-examples",
        tensors,
        about={"epsilon": inputs.epsilon, "norm": "linf"},
        params=inputs.settings.model_dump(mode="json"),
        inputs={"dataset": inputs.data.sha256} | {name: model.header.sha256 for name, model in sources.items()},
        seed=inputs.seed,
        metrics={},
        seconds=seconds,
        timings=timings,
    )
    console.say(f"adversarial images written to {paths.ADVERSARIAL}")

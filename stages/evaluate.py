"""evaluate: clean and robust accuracy of the mixture, its experts and the baselines on the test split, with checks.

Reads `seed`, `epsilon`, `evaluate`, the data set, the mixture, the pre-trained experts and the baselines. Writes
metrics/headline.json (DVC metrics), metrics/evaluate.json (all accuracies), metrics/verdict.json (the checks),
metrics/evaluate/ (one file per model), metrics/decisions/ (correctness per image), plots/evaluate/ and
artifacts/evaluate/adversarial.safetensors (the adversarial images).

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
from advmoe.evaluation.config import EvaluateSection, applicable_attacks, robustness_curve
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget, clear_resume_state, evaluate
from advmoe.evaluation.headline import headline
from advmoe.evaluation.minimal_perturbation import minimal_epsilons
from advmoe.evaluation.summary import ModelResult
from advmoe.models import classifiers
from advmoe.models.classifiers import Classifier, MixtureArchitecture
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import distributed, machine
from advmoe.runtime.machine import evaluation_seed
from advmoe.runtime.parallel import parallel_map
from advmoe.statistics import decisions
from advmoe.statistics.decisions import WORST
from advmoe.statistics.paired_tests import compare_paired


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of the pipeline. `full`: runs all attacks and the checks; otherwise only the attacks for experts."""

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
    @lru_cache(maxsize=1)  # a worker process evaluates several models
    def read(cls) -> "Inputs":
        """Loads the inputs. Raises UserError for missing files and models trained on other data."""
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
                raise UserError(f"{name}: not trained on {paths.DATASET}; run `dvc repro`")
        return inputs

    @property
    def split(self) -> Split:
        """The images to evaluate on."""
        return self.data["test"].first(self.settings.limit)

    @property
    def config(self) -> EvaluationConfig:
        """The config of the harness."""
        return self.settings.evaluation_config(LInf(self.epsilon), evaluation_seed(self.seed))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in the gate's order."""
        return _architecture(self.mixture).experts

    def models(self) -> dict[str, EvaluatedModel]:
        """Every model to evaluate, by name, the most expensive first."""
        joint = self.mixture.model
        assert isinstance(joint, MixtureOfExperts)
        pretrained = [expert.model for expert in self.experts.values()]
        untrained = classifiers.build_mixture(_architecture(self.mixture), self.mixture.about.facts, pretrained, 0)
        baselines = self.baselines.items()
        models = [
            EvaluatedModel(summary.MIXTURE, joint, full=True),
            EvaluatedModel(summary.UNIFORM, classifiers.uniform_mixture(joint)),
            EvaluatedModel(summary.BEFORE, untrained),
            *(EvaluatedModel(summary.BASELINE + name, baseline.model, full=True) for name, baseline in baselines),
            *(EvaluatedModel(summary.PRETRAINED + name, expert.model) for name, expert in self.experts.items()),
            *(
                EvaluatedModel(summary.JOINT + name, expert)
                for name, expert in zip(self.names, joint.experts, strict=True)
            ),
        ]
        return {model.name: model for model in models}


def run() -> None:
    """Evaluates all models of the pipeline. Processes share the images; rank 0 runs the checks and writes."""
    started = time.monotonic()
    Inputs.read.cache_clear()
    inputs = Inputs.read()
    names = list(inputs.models())
    results = dict(zip(names, parallel_map(evaluate_one, names), strict=True))
    if not distributed.is_rank0():
        return
    _compare(results, inputs.seed)
    _write(results, inputs)
    _write_examples(results, inputs, time.monotonic() - started)
    for result in results.values():
        clear_resume_state(result.target, result.attacks, inputs.config)
    console.info("`advmoe results` shows all results")


def _architecture(mixture: Classifier) -> MixtureArchitecture:
    assert isinstance(mixture.about.architecture, MixtureArchitecture)
    return mixture.about.architecture


def evaluate_one(name: str) -> ModelResult:
    """Evaluates one model of the pipeline. Runs in a worker process if there are enough cores."""
    inputs, device = Inputs.read(), machine.device()
    settings, split, evaluated = inputs.settings, inputs.split, inputs.models()[name]
    sources = {summary.BASELINE + key: baseline.model.to(device) for key, baseline in inputs.baselines.items()}
    target = EvaluationTarget(
        name=name,
        model=evaluated.model.to(device),
        images=split.pixels().to(device),
        labels=split.labels.to(device),
        sources={key: model for key, model in sources.items() if key != name},
    )
    selected = settings.all_attacks() if evaluated.full else {key: settings.attacks[key] for key in settings.experts}
    attacks = applicable_attacks(selected, target.has_gate, target.sources)
    result = ModelResult(target, attacks, evaluate(target, attacks, inputs.config))
    if evaluated.full:
        _run_checks(result, inputs)
    class_names = inputs.data.facts.class_names
    result.metrics = serialise.model_metrics(result.evaluation, attacks, inputs.config, class_names, result.verdict)
    console.info(f"{name}: " + ", ".join(f"{kind} {share}" for kind, share in result.evaluation.accuracies().items()))
    return result


def _run_checks(result: ModelResult, inputs: Inputs) -> None:
    settings, config, target = inputs.settings, inputs.config, result.target
    training_hashes = frozenset(content_hashes(inputs.data["train"].images))
    context = CheckContext(target, result.attacks, result.evaluation, config, settings.checks, training_hashes)
    if distributed.is_rank0():
        result.verdict = verdict.run_checks(context)
    result.robustness_curve = dict(robustness_curve(target, settings.grid, config))
    result.minimal_epsilons = minimal_epsilons(target, settings.minimal, result.evaluation, config)


def _compare(results: dict[str, ModelResult], seed: int) -> None:
    """Compares the mixture with every other model, paired by image.

    Models with a verdict are compared in the worst case over all attacks run on each: leaving out gate-aware attacks
    would favour the mixture. The others are compared over the attacks run on both.
    """
    mixture = results[summary.MIXTURE]
    for name, other in results.items():
        if other is mixture:
            continue
        common = [attack for attack in other.evaluation.outcomes if attack in mixture.evaluation.outcomes]
        correct = mixture.evaluation.correct[WORST] if other.verdict else mixture.evaluation.correct_under(common)
        mixture.comparisons[name] = compare_paired(correct, other.evaluation.correct[WORST], seed).as_dict()


def _write(results: dict[str, ModelResult], inputs: Inputs) -> None:
    mixture = results[summary.MIXTURE]
    weights = gate_report.gate_weights_by_attack(mixture.target, mixture.evaluation, inputs.names)
    mixture.extra = {"gate": weights, "oracle_routing": gate_report.oracle_accuracy(mixture.target, mixture.evaluation)}
    for name, result in results.items():
        files.write_json(summary.report_path(name), summary.model_report(name, result, inputs.epsilon))
        files.write_csv(decisions.path(name), serialise.decision_rows(result.evaluation, inputs.split))
    summarised = summary.summarise(results, inputs.epsilon)
    files.write_json(paths.SUMMARY, summarised)
    files.write_json(paths.HEADLINE, headline(summarised))
    verdicts = {name: result.verdict for name, result in results.items() if result.verdict}
    files.write_json(paths.VERDICT, {name: verdict.as_dict() for name, verdict in verdicts.items()})
    plots.write_plots(results, weights, inputs.data.facts.class_names)


def _write_examples(results: dict[str, ModelResult], inputs: Inputs, seconds: float) -> None:
    split = inputs.split
    tensors: dict[str, Tensor] = {"images": split.images, "labels": split.labels, "index": split.index}
    timings: dict[str, float] = {}
    for name, result in results.items():
        # no images for models without a verdict: those of eighteen experts would fill the disk
        tensors |= serialise.decision_tensors(name, result.evaluation, with_images=result.verdict is not None)
        timings |= serialise.timings(name, result.evaluation)
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
    console.info(f"adversarial images written to {paths.ADVERSARIAL}")

"""Training of victims and clean twins, and whole poisoning studies with their files."""

import contextlib
import copy
import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import Tensor, nn

import advmoe
from advmoe.config.schema import load_params
from advmoe.core import artifacts, paths
from advmoe.core.errors import UserError
from advmoe.core.files import write_text
from advmoe.core.settings import load_section, read_yaml, validate
from advmoe.data import dataset
from advmoe.data.batches import batches
from advmoe.data.dataset import Dataset, Split
from advmoe.models import classifiers
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import generator
from advmoe.threats import victim_training
from advmoe.threats.poisoning import adhoc, experiment, metrics, poisoned_set, report
from advmoe.threats.poisoning.adhoc import PoisonRequest
from advmoe.threats.poisoning.config import PoisonSection, Study
from advmoe.threats.poisoning.experiment import ExperimentContext, PoisonExperiment
from advmoe.threats.poisoning.registry import poison
from advmoe.threats.victim_training import (
    JOINT_ONLY,
    MIXTURE,
    VictimRecipes,
    VictimSpec,
    matching_pipeline_model,
    train_proxy,
    train_victims,
)
from advmoe.training import single, trainer
from advmoe.training.flops import TrainingCost
from advmoe.training.job import TrainingJob, TrainingResult, TrainingTask
from advmoe.training.joint import JointRun, train_mixture
from stages import baseline, prepare, pretrain, train
from stages import poison as stage

EXPERTS = ["clean", "pgd-1"]
PGD = {"kind": "pgd", "steps": [1], "step_size": 0.5}
LOOK = {"steps": 1, "step_size": 0.5, "gap": 0.2, "images": 20}
PIPELINE: dict[str, Any] = {  # two experts, a mixture and two baselines in a few seconds
    "prepare.splits": {"pool": 1517, "validation": 60, "test": 120},  # 100 to train on, in one batch
    "pretrain.batch_size": 128,
    "train.batch_size": 128,
    "pretrain.validation": LOOK,
    "train.validation": LOOK,
    "train.experts": EXPERTS,
    "train.adversary": PGD,
    "experts.pgd-1": {"seed": 5, "adversary": PGD},
    "baseline.adversarial.adversary": PGD,
}
BADNETS = {"kind": "badnets", "size": 2, "target": 0}

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, built_project: Path) -> Path:
    """A pipeline of tiny networks, all of them trained by the stages."""
    from conftest import edit_params

    folder = tmp_path_factory.mktemp("poisoning") / "built"
    shutil.copytree(built_project, folder)
    with contextlib.chdir(folder):
        torch.set_num_threads(1)
        edit_params(PIPELINE)
        content = read_yaml(Path("params.yaml"))
        content["experts"] = {name: content["experts"][name] for name in EXPERTS}
        # what no test here reads is left out: the file is parsed again for every section
        write_text(Path("params.yaml"), json.dumps({name: content[name] for name in content if name != "evaluate"}))
        prepare.run()
        for name in EXPERTS:
            pretrain.run(name)
        train.run()
        for name in ("standard", "adversarial"):
            baseline.run(name)
    return folder


@pytest.fixture
def pipeline(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that pipeline; the test runs inside it."""
    folder = tmp_path / "pipeline"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(artifacts, "_git", lambda *_: None)  # asked twice for every file, and this is no repository
    victim_training._clean_dataset.cache_clear()
    yield folder
    victim_training._clean_dataset.cache_clear()


@lru_cache(maxsize=8)
def _recipes(text: str) -> VictimRecipes:
    del text
    return VictimRecipes.from_params()


def read_recipes() -> VictimRecipes:
    """Those of ./params.yaml, read once for each content that the file has."""
    return _recipes(Path("params.yaml").read_text())


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two networks have the same weights and statistics, to the last bit."""
    ours, theirs = classifiers.state_dict_of(left), classifiers.state_dict_of(right)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def make_case(attack: dict[str, Any] | None = None, **changes: Any) -> PoisonExperiment:
    """The study of params.yaml with a few things changed."""
    section = load_section("poison", PoisonSection)
    asked = section.attacks["badnets"].model_dump() | changes
    if attack is not None:
        asked["attack"] = attack
    made = validate(asked, Study, "test")
    return PoisonExperiment("badnets", made, section.common, read_recipes(), dataset.load(paths.DATASET))


def poisoned_train() -> Split:
    case = make_case()
    made = poison(case.data["train"], generator("study"), case.study.attack, 0.3, ExperimentContext(case, case.recipes))
    return experiment._train_split(case, made)


def order(victim: str, train: Split | None = None, added: int = 0) -> VictimSpec:
    return VictimSpec(victim, read_recipes().with_seed_offset(added), train)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content; nothing for a folder that is not there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def tracked() -> dict[str, bytes]:
    """What lies under metrics/ and plots/."""
    return {
        f"{folder}/{name}": content for folder in ("metrics", "plots") for name, content in tree(Path(folder)).items()
    }


class RecordedEpochs:
    """Records the network, images and labels of every training epoch, before augmentation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epochs: list[tuple[str, Tensor, Tensor]] = []
        self.name = ""
        begin, give = trainer.Trainer.__init__, batches

        def begun(run: trainer.Trainer, learner: TrainingTask, course: TrainingJob) -> None:
            self.name = course.name
            begin(run, learner, course)

        def given(images: Tensor, labels: Tensor, *rest: Any) -> Any:
            self.epochs.append((self.name, images.clone(), labels.clone()))
            return give(images, labels, *rest)

        monkeypatch.setattr(trainer.Trainer, "__init__", begun)
        monkeypatch.setattr(trainer, "batches", given)

    def of(self, name: str) -> list[tuple[Tensor, Tensor]]:
        return [(images, labels) for who, images, labels in self.epochs if who == name]

    @property
    def names(self) -> list[str]:
        return [who for who, _, _ in self.epochs]


# ---- victims


def test_a_victim_without_poison_equals_the_network_of_the_pipeline(pipeline: Path) -> None:
    """The same code, recipe and seed: weight for weight what pretrain, train and baseline have written."""
    clean = dataset.load(paths.DATASET)["train"]
    names = [MIXTURE, JOINT_ONLY, "standard", "adversarial"]
    found = train_victims([order(name, clean) for name in names])
    kept = [paths.MIXTURE, paths.MIXTURE, *(paths.artifact("baseline", name) for name in names[2:])]
    assert [same(made.model, classifiers.load(path).model) for made, path in zip(found, kept, strict=True)] == [
        True
    ] * 4
    for path in (pipeline / path for path in kept):
        assert path.is_file()


def test_poison_reaches_experts_and_gate_of_the_mixture(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    recorded, changed = RecordedEpochs(monkeypatch), poisoned_train()
    (made,) = train_victims([order(MIXTURE, changed)])
    assert recorded.names == [*EXPERTS, "mixture"]
    for _, images, labels in recorded.epochs:
        assert torch.equal(images, changed.images)
        assert torch.equal(labels, changed.labels)
    assert isinstance(made.model, MixtureOfExperts)
    assert not same(made.model, classifiers.load(paths.MIXTURE).model)


def test_only_the_joint_phase_of_the_weaker_threat_is_poisoned(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    recorded, changed, recipes = RecordedEpochs(monkeypatch), poisoned_train(), read_recipes()
    (made,) = train_victims([order(JOINT_ONLY, changed)])
    assert recorded.names == ["mixture"]  # the experts are the pipeline's
    assert torch.equal(recorded.epochs[0][1], changed.images)
    data = dataset.load(paths.DATASET)
    experts = [classifiers.load(paths.artifact("pretrain", name)).model for name in EXPERTS]
    there = replace(data, splits={**data.splits, "train": changed})
    expected, _ = train_mixture(
        JointRun(experts, recipes.backbone, there, recipes.joint, seed=0, epsilon=recipes.epsilon)
    )
    assert same(made.model, expected.model)


def test_other_seeds_train_their_own_clean_experts(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    recorded, changed, clean = RecordedEpochs(monkeypatch), poisoned_train(), dataset.load(paths.DATASET)["train"]
    train_victims([order(JOINT_ONLY, changed, added=1)])
    assert recorded.names == [*EXPERTS, "mixture"]
    assert [torch.equal(images, clean.images) for _, images, _ in recorded.epochs] == [True, True, False]
    assert torch.equal(recorded.epochs[2][1], changed.images)


def test_victims_are_returned_in_the_order_of_their_specs(pipeline: Path) -> None:
    del pipeline
    asked = [order("standard"), order(JOINT_ONLY), order("standard", added=1)]
    found = [made.model for made in train_victims(asked)]
    assert [isinstance(model, MixtureOfExperts) for model in found] == [False, True, False]
    assert same(found[0], classifiers.load(paths.artifact("baseline", "standard")).model)
    assert not same(found[2], found[0])


def test_no_victims_are_no_results() -> None:
    assert train_victims([]) == []


def test_validation_and_facts_stay_clean(pipeline: Path) -> None:
    del pipeline
    clean, changed = victim_training._dataset_with(None), victim_training._dataset_with(poisoned_train())
    assert changed["validation"] is clean["validation"]
    assert changed.facts == clean.facts
    assert not torch.equal(changed["train"].images, clean["train"].images)


# ---- clean twins


@pytest.mark.parametrize("victim", [MIXTURE, "standard", "adversarial"])
def test_the_pipelines_model_is_the_twin_under_the_pipelines_seed_only(pipeline: Path, victim: str) -> None:
    del pipeline
    kept = paths.MIXTURE if victim == MIXTURE else paths.artifact("baseline", victim)
    twin = matching_pipeline_model(victim, read_recipes())
    assert twin is not None
    assert same(twin, classifiers.load(kept).model)
    assert matching_pipeline_model(victim, read_recipes().with_seed_offset(1)) is None


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"seed": 7}, [MIXTURE, "standard", "adversarial"]),
        ({"epsilon": 0.05}, [MIXTURE, "adversarial"]),
        ({"model.width": 3}, [MIXTURE, "standard", "adversarial"]),
        ({"pretrain.optimizer.lr": 0.2}, [MIXTURE, "standard", "adversarial"]),
        ({"train.optimizer.lr": 0.2}, [MIXTURE]),
        ({"train.epochs": 2}, [MIXTURE, "standard", "adversarial"]),  # baselines train as long in total
        ({"train.experts": ["clean"]}, [MIXTURE]),
        ({"baseline.standard.seed": 3}, ["standard"]),
        ({"experts.pgd-1.seed": 9}, [MIXTURE]),
    ],
    ids=str,
)
def test_models_of_other_recipes_are_no_twins(
    pipeline: Path, edit: Edit, change: dict[str, Any], lost: list[str]
) -> None:
    del pipeline
    edit(change)
    recipes = read_recipes()
    assert [
        name for name in (MIXTURE, "standard", "adversarial") if matching_pipeline_model(name, recipes) is None
    ] == lost


def test_models_of_other_data_are_no_twins(pipeline: Path, edit: Edit) -> None:
    del pipeline
    edit({"prepare.splits": {"pool": 1500, "validation": 60, "test": 120}})
    prepare.run()
    victim_training._clean_dataset.cache_clear()
    recipes = read_recipes()
    assert [matching_pipeline_model(name, recipes) for name in (MIXTURE, "standard", "adversarial")] == [None] * 3


@pytest.mark.parametrize("victim", [MIXTURE, "standard"])
def test_models_that_are_not_there_are_no_twins(pipeline: Path, victim: str) -> None:
    shutil.rmtree(pipeline / "artifacts" / "pretrain")
    shutil.rmtree(pipeline / "artifacts" / "baseline")
    assert matching_pipeline_model(victim, read_recipes()) is None


def test_a_mixture_of_experts_that_have_changed_since_is_no_twin(pipeline: Path) -> None:
    path = pipeline / paths.artifact("pretrain", "clean")
    old = classifiers.load(path)
    with torch.no_grad():
        next(old.model.parameters()).add_(1)
    header = old.header
    classifiers.save(
        path,
        old.model,
        old.about.architecture,
        old.about.facts,
        params=header.params,
        inputs=header.inputs,
        seed=header.seed,
        metrics={},
        seconds=0.0,
    )
    assert matching_pipeline_model(MIXTURE, read_recipes()) is None


def test_twins_are_the_models_of_the_pipeline_if_they_match_and_trained_otherwise(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del pipeline
    recorded, clean = RecordedEpochs(monkeypatch), dataset.load(paths.DATASET)["train"]
    at_hand, missing = experiment._clean_twins(make_case(victims=("standard", JOINT_ONLY), seeds=(0, 1)))
    assert (list(at_hand), list(missing)) == ([("standard", 0), (MIXTURE, 0)], [("standard", 1), (MIXTURE, 1)])
    assert same(at_hand["standard", 0], classifiers.load(paths.artifact("baseline", "standard")).model)
    assert same(at_hand[MIXTURE, 0], classifiers.load(paths.MIXTURE).model)
    standard, _ = train_victims(list(missing.values()))
    assert set(recorded.names) == {"baseline-standard", *EXPERTS, "mixture"}  # those of seed 1
    assert all(torch.equal(images, clean.images) for _, images, _ in recorded.epochs)
    assert not same(standard.model, at_hand["standard", 0])


# ---- the attacker's proxy network


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces training: the result is the initial network."""

    def fit(learner: TrainingTask, course: TrainingJob) -> TrainingResult:
        del course
        return TrainingResult(copy.deepcopy(learner.model), [], {}, [], TrainingCost(0, 0, 0, 0, 0, 0, 0), 0.0)

    monkeypatch.setattr(single, "fit", fit)


@pytest.mark.parametrize("proxy_seed", [0, 1, 100])
@pytest.mark.usefixtures("untrained")
def test_no_proxy_starts_where_a_victim_starts(pipeline: Path, proxy_seed: int) -> None:
    """Not even with the victims' own seed."""
    del pipeline
    for name in ("standard", "adversarial"):
        proxy = train_proxy(name, read_recipes(), proxy_seed)
        for added in (0, 1, 100):
            (victim,) = train_victims([order(name, added=added)])
            assert not same(proxy, victim.model)


@pytest.mark.parametrize("proxy_seed", [0, 100])
def test_a_proxy_is_trained_as_the_baseline_but_is_another_network(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit, proxy_seed: int
) -> None:
    del pipeline
    edit({"poison.proxy_seed": proxy_seed})
    recorded, case = RecordedEpochs(monkeypatch), make_case()
    context = ExperimentContext(case, case.recipes)
    proxy = context.proxy("standard")
    assert context.proxy("standard") is proxy  # trained once
    assert recorded.names == ["proxy-standard"] * 2  # as long as a baseline, by no victim's name
    assert torch.equal(recorded.epochs[0][1], case.data["train"].images)
    assert not same(proxy, classifiers.load(paths.artifact("baseline", "standard")).model)


def test_a_proxy_that_is_the_victims_twin_is_noticed(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del pipeline
    case = make_case()
    monkeypatch.setattr(experiment, "train_proxy", lambda name, recipes, _seed: matching_pipeline_model(name, recipes))
    with pytest.raises(AssertionError, match="the proxy is the victim"):
        ExperimentContext(case, case.recipes).proxy("standard")


def test_a_proxy_that_is_trained_as_the_victim_is_noticed(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights, but fresh from training: not the same bytes as the twin that was on disk."""
    del pipeline
    case = make_case()
    monkeypatch.setattr(
        experiment,
        "train_proxy",
        lambda name, recipes, _seed: train_victims([VictimSpec(name, recipes, None)])[0].model,
    )
    with pytest.raises(AssertionError, match="the proxy is the victim"):
        ExperimentContext(case, case.recipes).proxy("standard")


def test_an_unknown_proxy_is_refused(pipeline: Path) -> None:
    del pipeline
    case = make_case()
    with pytest.raises(UserError, match=r"^proxy: no baseline is called 'nobody'; there are standard, adversarial$"):
        ExperimentContext(case, case.recipes).proxy("nobody")


def test_an_untrained_network_is_no_victim(pipeline: Path) -> None:
    del pipeline
    case = make_case()
    first, again = (ExperimentContext(case, case.recipes).untrained_network() for _ in range(2))
    other = ExperimentContext(case, case.recipes.with_seed_offset(1)).untrained_network()
    assert first is not again
    assert same(first, again)
    assert not same(first, other)


# ---- poisoned sets


@pytest.mark.parametrize("augmentation", [{"crop": 0, "flip": False}, {"crop": 2, "flip": True}], ids=str)
def test_victims_are_trained_on_exactly_the_images_in_the_file(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit, augmentation: dict[str, Any]
) -> None:
    """In every epoch, and before any crop or flip."""
    edit({"pretrain.augmentation": augmentation, "pretrain.epochs": 2})
    recorded, case = RecordedEpochs(monkeypatch), make_case(rates=(0.2,))
    experiment.run(case, pipeline / "models")
    stored = poisoned_set.load(pipeline / "models" / "rate-0.2-seed-0-trial-0.safetensors")
    twin_and_victim = recorded.of("baseline-standard")
    assert len(twin_and_victim) == 6  # three epochs each
    for images, labels in twin_and_victim[3:]:
        assert torch.equal(images, stored.images)
        assert torch.equal(labels, stored.labels)
    clean = case.data["train"]
    assert all(torch.equal(images, clean.images) for images, _ in twin_and_victim[:3])
    expected = clean.images[stored.rows].clone()
    expected[:, :, -2:, -2:] = 255
    assert torch.equal(stored.images[stored.rows], expected)
    assert len(stored.rows) == round(0.2 * len(clean))


def test_a_poisoned_set_depends_on_rate_seed_and_trial_only(pipeline: Path) -> None:
    folder = pipeline / "models"
    torch.manual_seed(1)
    first = list(experiment._craft_poisoned_sets(make_case(rates=(0.1, 0.3), seeds=(0, 1)), folder))
    before = tree(folder)
    torch.manual_seed(2)
    again = list(experiment._craft_poisoned_sets(make_case(rates=(0.3,), seeds=(1,), victims=("adversarial",)), folder))
    assert again[0].sha256 == first[3].sha256
    assert [dose.title for dose in first] == [
        f"rate-{rate}-seed-{added}-trial-0" for added in (0, 1) for rate in (0.1, 0.3)
    ]
    names = {f"{dose.title}{suffix}" for dose in first for suffix in (".safetensors", ".run.json")}
    assert set(before) == names
    rows = [set(dose.poisoned.rows.tolist()) for dose in first]
    assert rows[0] < rows[1]  # the images of a lower rate are among those of a higher one
    assert rows[2] < rows[3]
    assert rows[0] != rows[2]
    header = artifacts.load(folder / f"{first[0].title}.safetensors", poisoned_set.KIND).header
    assert header.sha256 == first[0].sha256
    assert header.inputs == {"dataset": dataset.load(paths.DATASET).sha256}
    assert header.about["rate"] == 0.1


# ---- whole studies


def test_a_study_of_every_kind_of_victim(pipeline: Path) -> None:
    case = make_case(rates=(0.2,), victims=(MIXTURE, JOINT_ONLY, "standard"))
    rows, _ = experiment.run(case, pipeline / "models")
    assert [row.victim for row in rows] == [MIXTURE, JOINT_ONLY, "standard"]
    stored = poisoned_set.load(pipeline / "models" / "rate-0.2-seed-0-trial-0.safetensors")
    test = case.data["test"].first(24)
    others = int((test.labels != 0).sum())
    for row in rows:
        assert row.amounts["n_poison"] == 20  # of 100
        assert row.amounts["share_of_set"] == 0.2
        zeros = int((case.data["train"].labels == 0).sum())
        assert row.amounts["share_of_target_class"] == round(20 / (zeros + 20), 6)
        assert row.metrics["asr"].total == others < 24
        assert row.metrics["clean_acc"].total == 24
        victim = classifiers.load(pipeline / "models" / "rate-0.2-seed-0-trial-0" / f"{row.victim}.safetensors").model
        assert stored.trigger is not None
        hits = metrics.predict_classes(victim, stored.trigger.stamp(test.images))[test.labels != 0] == 0
        assert row.metrics["asr"].correct == int(hits.sum())
    assert {"asr_clean", "asr_pgd-1", "gate_shift", "gate_entropy", "gate_entropy_triggered"} <= rows[1].metrics.keys()
    assert "gate_shift" not in rows[2].metrics


def test_a_defended_victim_is_trained_without_flagged_images(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, case = RecordedEpochs(monkeypatch), make_case(rates=(0.2,), defences=("oracle", "spectral"))
    rows, _ = experiment.run(case, pipeline / "models")
    assert [row.defence for row in rows] == ["", "oracle", "spectral"]
    stored = poisoned_set.load(pipeline / "models" / "rate-0.2-seed-0-trial-0.safetensors")
    kept = ~stored.is_poison
    images, labels = recorded.of("baseline-standard")[2]  # after the two epochs of the victim
    assert torch.equal(images, stored.images[kept])
    assert torch.equal(labels, stored.labels[kept])
    oracle = rows[1].metrics
    assert (oracle["tpr"].correct, oracle["tpr"].total) == (20, 20)
    assert (oracle["fpr"].correct, oracle["fpr"].total) == (0, 80)
    quota = sum(round(1.5 * 0.1 * int((stored.labels == label).sum())) for label in range(10))
    assert rows[2].metrics["tpr"].correct + rows[2].metrics["fpr"].correct == quota
    assert "asr" in oracle
    assert "tpr" not in rows[0].metrics
    names = {path.name for path in (pipeline / "models" / "rate-0.2-seed-0-trial-0").glob("*.safetensors")}
    assert names == {"standard.safetensors", "standard-oracle.safetensors", "standard-spectral.safetensors"}


@pytest.mark.usefixtures("untrained")
def test_every_target_of_witches_brew_has_separate_victims(pipeline: Path) -> None:
    brew = {"kind": "witches-brew", "epsilon": 0.1, "steps": 1, "step_size": 0.1, "restarts": 1, "targets": 3}
    case = make_case(brew | {"proxy": "adversarial"}, rates=(0.05,))
    rows, _ = experiment.run(case, pipeline / "models")
    assert [row.trial for row in rows] == [0, 1, 2]
    assert all(row.metrics["success"].total == 1 for row in rows)
    assert len({row.amounts["sha256"] for row in rows}) == 3
    pooled = report.aggregate_metric(rows, "success")
    assert (pooled.correct, pooled.total) == (sum(row.metrics["success"].correct for row in rows), 3)


@pytest.mark.parametrize(
    ("attack", "rate", "columns"),
    [
        ({"kind": "label-flip-targeted", "source": 4, "target": 9}, 0.5, {"source_to_target"}),
        (
            {
                "kind": "unlearnable",
                "epsilon": 0.1,
                "steps": 1,
                "step_size": 0.5,
                "rounds": 1,
                "learning_steps": 1,
                "batch_size": 8,
                "lr": 0.1,
                "stop": 0.0,
            },
            1.0,
            set(),
        ),
        ({"kind": "error-maximising", "epsilon": 0.1, "steps": 1, "step_size": 0.5, "proxy": "standard"}, 1.0, set()),
        (
            {
                "kind": "label-consistent",
                "size": 2,
                "target": 3,
                "epsilon": 0.1,
                "steps": 1,
                "step_size": 0.5,
                "proxy": "adversarial",
            },
            0.5,
            {"asr", "trigger_recovery_acc"},
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("untrained")
def test_studies_of_other_attacks(pipeline: Path, attack: dict[str, Any], rate: float, columns: set[str]) -> None:
    (row,), _ = experiment.run(make_case(attack, rates=(rate,)), pipeline / "models")
    assert columns <= row.metrics.keys()
    assert {"clean_acc", "d_clean_acc", "robust_acc", "d_robust_acc"} <= row.metrics.keys()
    assert ("asr" in row.metrics) == ("asr" in columns)


# ---- the stage


def declared(name: str) -> list[Path]:
    """Outputs of poison@NAME in dvc.yaml."""
    entry = read_yaml(ROOT / "dvc.yaml")["stages"]["poison"]["do"]
    listed = [*entry["outs"], *entry["plots"]]
    return [Path(str(next(iter(out)) if isinstance(out, dict) else out).replace("${key}", name)) for out in listed]


def test_the_stage_writes_all_outputs_of_dvc_yaml(pipeline: Path, edit: Edit) -> None:
    edit({"poison.attacks.badnets.rates": [0.1, 0.2], "poison.attacks.badnets.victims": [JOINT_ONLY, "standard"]})
    before = tree(pipeline)
    stage.run("badnets")
    after = tree(pipeline)
    expected = declared("badnets")
    assert all(path.exists() for path in expected)
    new = {name for name in after if name not in before}
    assert all(any(Path(name).is_relative_to(path) for path in expected) for name in new)
    assert {name: after[name] for name in before} == before
    head = json.loads((pipeline / "metrics/poison/badnets.json").read_text())
    assert set(head) == {"schema_version", "attack", "epsilon", "images", JOINT_ONLY, "standard"}
    assert (head["attack"], head["epsilon"], head["images"]) == ("badnets", 0.1, 24)
    for victim in (JOINT_ONLY, "standard"):
        assert set(head[victim]) == {"0.1", "0.2"}
        for means in head[victim].values():
            assert {"clean_acc", "d_clean_acc", "robust_acc", "d_robust_acc", "asr", "asr_clean_twin"} <= means.keys()
            assert {"d_asr", "trigger_recovery_acc"} <= means.keys()
            assert all(math.isfinite(number) for number in means.values())
    runs = json.loads((pipeline / "metrics/poison-runs/badnets.json").read_text())["runs"]
    assert [(run["victim"], run["rate"], run["seed"]) for run in runs] == [
        (victim, rate, 0) for rate in (0.1, 0.2) for victim in (JOINT_ONLY, "standard")
    ]
    for run in runs:
        assert {"low", "high", "correct", "total"} <= run["asr"].keys()
        assert {"n_poison", "rate_of", "share_of_set", "share_of_target_class", "sha256"} <= run.keys()
        file = f"rate-{run['rate']:g}-seed-0-trial-0"
        stored = artifacts.load(pipeline / "artifacts/poison/badnets" / f"{file}.safetensors")
        assert stored.header.sha256 == run["sha256"]
        assert len(stored.tensors["rows"]) == run["n_poison"]
        model = advmoe.load_model(pipeline / "artifacts/poison/badnets" / file / f"{run['victim']}.safetensors")
        assert model(torch.rand(2, 1, 8, 8)).exp().sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-4)
    with (pipeline / "plots/poison/badnets/curve.csv").open() as file_:
        lines = list(csv.DictReader(file_))
    assert [line["rate"] for line in lines] == ["0.1", "0.2"]
    assert float(lines[0]["asr standard"]) == head["standard"]["0.1"]["asr"]
    with Image.open(pipeline / "plots/poison/badnets/examples.png") as picture:
        picture.load()
        assert picture.format == "PNG"


def test_the_stage_repeats_itself_byte_for_byte(pipeline: Path, edit: Edit) -> None:
    edit({"poison.attacks.badnets.victims": ["standard", "adversarial"]})

    def results() -> dict[str, bytes]:
        found = {f"{path}/{name}": text for path in declared("badnets") for name, text in tree(path).items()}
        found |= {str(path): path.read_bytes() for path in declared("badnets") if path.is_file()}
        return {name: content for name, content in found.items() if not name.endswith(".run.json")}

    torch.manual_seed(1)
    stage.run("badnets")
    first = results()
    for path in declared("badnets"):
        shutil.rmtree(pipeline / path) if path.is_dir() else path.unlink()
    torch.manual_seed(2)
    stage.run("badnets")
    assert results() == first
    assert len(first) == 3 + 4  # a set and two victims; two metrics files, a curve and a picture


def test_label_flips_have_no_preview_image(pipeline: Path, edit: Edit) -> None:
    edit({"poison.attacks.badnets.attack": {"kind": "label-flip-random"}})
    stage.run("badnets")
    assert [path.name for path in (pipeline / "plots/poison/badnets").iterdir()] == ["curve.csv"]


def test_an_unknown_study_is_refused(pipeline: Path) -> None:
    del pipeline
    with pytest.raises(UserError, match=r"^poison\.attacks has no 'nobody'; there are badnets$"):
        stage.run("nobody")


# ---- errors


def refusal(work: Callable[[], object]) -> str:
    """Returns the error message; metrics/ and plots/ must be unchanged."""
    before = tracked()
    with pytest.raises(UserError) as caught:
        work()
    assert tracked() == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


BREW = {
    "kind": "witches-brew",
    "epsilon": 0.1,
    "steps": 1,
    "step_size": 0.1,
    "restarts": 1,
    "targets": 1,
    "proxy": "standard",
}


def test_more_poison_than_the_class_holds_is_refused(pipeline: Path, edit: Edit) -> None:
    del pipeline
    edit({"poison.attacks.badnets.attack": BREW, "poison.attacks.badnets.rates": [0.5]})
    assert refusal(lambda: stage.run("badnets")).startswith("50 images should be poisoned, but class ")


def test_a_detector_that_flags_a_whole_class_is_refused(
    pipeline: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    del pipeline
    edit({"poison.attacks.badnets.defences": ["clustering"]})
    monkeypatch.setattr(experiment, "flag_poison", lambda inputs, *_: inputs.train.labels == 3)
    expected = "defence 'clustering' removes all training images of class 3; let it remove fewer"
    assert refusal(lambda: stage.run("badnets")) == expected


@pytest.mark.usefixtures("untrained")
def test_the_oracle_on_a_fully_poisoned_set_is_refused(pipeline: Path, edit: Edit) -> None:
    del pipeline
    attack = {"kind": "error-maximising", "epsilon": 0.1, "steps": 1, "step_size": 0.5, "proxy": "standard"}
    study_ = {"attack": attack, "rates": [1.0], "victims": ["standard"], "seeds": [0], "defences": ["oracle"]}
    edit({"poison.attacks.badnets": study_})
    expected = "defence 'oracle' removes all training images of class 0; let it remove fewer"
    assert refusal(lambda: stage.run("badnets")) == expected


def test_a_test_set_without_the_source_class_is_refused(pipeline: Path, edit: Edit) -> None:
    del pipeline
    labels = dataset.load(paths.DATASET)["test"].labels[:3].tolist()
    source = next(label for label in range(10) if label not in labels)
    attack = {"kind": "label-flip-targeted", "source": source, "target": labels[0]}
    edit({"poison.images": 3, "poison.attacks.badnets.attack": attack, "poison.attacks.badnets.rates": [0.5]})
    expected = f"there is no test image of class {source}, so label flips from it cannot be measured"
    assert refusal(lambda: stage.run("badnets")) == expected


def test_a_test_set_of_the_target_only_is_refused(pipeline: Path, edit: Edit) -> None:
    del pipeline
    first = int(dataset.load(paths.DATASET)["test"].labels[0])
    edit({"poison.images": 1, "poison.attacks.badnets.attack": BADNETS | {"target": first}})
    expected = f"all test images are of the target class {first}, so no attack can succeed on them"
    assert refusal(lambda: stage.run("badnets")) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"victims": ["nobody"]},
            "victim 'nobody' is not known; there are mixture, mixture-joint, standard, adversarial",
        ),
        (
            {"defences": ["nobody"]},
            "params.yaml: poison: attacks.badnets.defences lists 'nobody', but defence has only ",
        ),
        (
            {"attack": BREW | {"proxy": "nobody"}},
            "proxy: no baseline is called 'nobody'; there are standard, adversarial",
        ),
        ({"attack": BADNETS | {"size": 9}}, "a trigger of 9 x 9 pixels is larger than the images, 8 x 8"),
        ({"attack": BADNETS | {"target": 10}}, "class 10 does not exist; the classes are 0 to 9"),
        ({"rates": [0.004]}, "rate 0.004 of 100 images (the training set) rounds to zero images"),
        ({"rates": [0.95]}, "95 images should be poisoned, but every class but 0 holds only "),
        ({"rates": []}, "params.yaml: poison.attacks.badnets.rates: "),
        ({"seeds": [0, 0]}, "params.yaml: poison.attacks.badnets: seeds contains duplicates"),
        ({"victims": ["standard", "standard"]}, "params.yaml: poison.attacks.badnets: victims contains duplicates"),
    ],
    ids=str,
)
def test_an_invalid_study_is_refused_before_training(
    pipeline: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: str
) -> None:
    del pipeline

    def learn(*_: object) -> TrainingResult:
        raise AssertionError("nothing should be trained for this")

    monkeypatch.setattr(victim_training, "_train_single", learn)
    edit({f"poison.attacks.badnets.{name}": value for name, value in change.items()})
    assert refusal(lambda: stage.run("badnets")).startswith(expected)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"poison.defence.spectral": {"kind": "spectral", "expected": 0.7, "excess": 1.5}},
            "poison.defence.spectral: removes a whole class: 1.5 times an expected share of 0.7 is all of it",
        ),
        (
            {"poison.attacks.badnets.attack": {"kind": "label-flip-targeted", "source": 3, "target": 3}},
            "poison.attacks.badnets.attack: source and target are both class 3, so nothing would be flipped",
        ),
        (
            {"poison.attacks.badnets.attack": {"kind": "nonsense"}},
            "poison.attacks.badnets.attack: input tag 'nonsense'",
        ),
        ({"poison.attacks.badnets.rates": [1]}, "poison.attacks.badnets: rates must lie between 0 and 1 for badnets"),
        ({"poison.attacks.badnets.rates": [0]}, "poison.attacks.badnets.rates.0: input should be greater than 0"),
        (
            {"poison.attacks.badnets.rates": [1.5]},
            "poison.attacks.badnets.rates.0: input should be less than or equal to",
        ),
        ({"poison.attacks.badnets.rates": [-0.1]}, "poison.attacks.badnets.rates.0: input should be greater than 0"),
        ({"poison.attacks": {}}, "poison.attacks: "),
        (
            {"poison.attacks.badnets.victims": ["nobody"]},
            "poison.attacks.badnets.victims lists 'nobody', but victims are ",
        ),
        (
            {"poison.attacks.badnets.victims": ["uniform"]},
            "poison.attacks.badnets.victims lists 'uniform', but victims are mixture, mixture-joint, standard, ",
        ),
        (
            {"poison.attacks.badnets.victims": ["equal-parameters"]},
            "poison.attacks.badnets.victims lists 'equal-parameters', but victims are mixture, mixture-joint, ",
        ),
        (
            {"poison.attacks.badnets.attack": BREW | {"proxy": "uniform"}},
            "poison.attacks.badnets.attack.proxy lists 'uniform', but a proxy is trained as standard, adversarial",
        ),
        (
            {"poison.attacks.badnets.attack": BREW | {"proxy": "nobody"}},
            "poison.attacks.badnets.attack.proxy lists 'nobody', but a proxy is trained as standard, adversarial",
        ),
        ({"poison.attacks.badnets.attack": BADNETS | {"target": -1}}, "poison.attacks.badnets.attack.target: "),
    ],
    ids=str,
)
def test_invalid_params_are_refused(inputs_only: Path, edit: Edit, section: dict[str, Any], expected: str) -> None:
    del inputs_only
    edit({"poison.attacks.badnets.defences": []})
    edit(section)
    message = refusal(load_params)
    assert message.startswith(f"params.yaml: {expected}")


# ---- quick runs


def test_a_quick_run_writes_to_runs_only(pipeline: Path) -> None:
    before = tree(pipeline)
    outputs = adhoc.run_request(PoisonRequest("badnets", rates=(0.2,), target=3, seeds=(1,), defences=("oracle",)))
    after = tree(pipeline)
    assert {name: content for name, content in after.items() if not name.startswith("runs/")} == before
    assert outputs.metrics.parts[0] == "runs"
    runs = json.loads(outputs.runs.read_text())["runs"]
    assert [(run["rate"], run["seed"], run["defence"]) for run in runs] == [(0.2, 1, ""), (0.2, 1, "oracle")]
    stored = poisoned_set.load(next(outputs.models.glob("*.safetensors")))
    assert stored.goal.target == 3
    assert (outputs.plots / "curve.csv").is_file()
    assert (outputs.plots / "examples.png").is_file()


def test_a_request_without_options_runs_the_study_unchanged(pipeline: Path) -> None:
    stage.run("badnets")
    recorded = tree(pipeline)
    outputs = adhoc.run_request(PoisonRequest("badnets"))
    assert outputs.metrics.parts[0] == "runs"
    assert outputs.metrics.read_bytes() == recorded["metrics/poison/badnets.json"]
    assert outputs.runs.read_bytes() == recorded["metrics/poison-runs/badnets.json"]
    assert {name: content for name, content in tree(pipeline).items() if not name.startswith("runs/")} == recorded


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (PoisonRequest("nobody"), "poison.attacks has no 'nobody'; there are badnets"),
        (
            PoisonRequest("badnets", defences=("nobody",)),
            "defence 'nobody' is not known; there are spectral, clustering,",
        ),
        (
            PoisonRequest("badnets", victims=("nobody",)),
            "victim 'nobody' is not known; there are mixture, mixture-joint,",
        ),
        (PoisonRequest("badnets", rates=(0.1, 0.1)), "poison badnets: rates contains duplicates"),
        (PoisonRequest("badnets", rates=(2.0,)), "poison badnets: rates.0: input should be less than or equal to 1"),
        (PoisonRequest("badnets", target=10), "class 10 does not exist; the classes are 0 to 9"),
    ],
    ids=str,
)
def test_an_invalid_request_is_refused_before_training(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, asked: PoisonRequest, expected: str
) -> None:
    monkeypatch.setattr(victim_training, "_train_single", lambda _: pytest.fail("nothing should be trained for this"))
    before = tree(pipeline)
    assert refusal(lambda: adhoc.run_request(asked)).startswith(expected)
    assert tree(pipeline) == before


def test_the_data_of_an_experiment_and_of_its_victims_are_the_same(pipeline: Path) -> None:
    del pipeline
    case, data = make_case(), victim_training._dataset_with(None)
    assert isinstance(data, Dataset)
    assert data.sha256 == case.data.sha256

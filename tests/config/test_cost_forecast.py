"""What params.yaml will cost, against what is worked out by hand and what the last run recorded."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Advmoe, Edit, sentence
from ruamel.yaml import YAML

from advmoe.config import schema
from advmoe.config.cost_forecast import Forecast, NetworkCost, StageCost, rows, split_sizes, time_step
from advmoe.config.schema import Params
from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.references import resolve_adversaries
from advmoe.core.settings import validate
from advmoe.data.registry import PrepareSettings
from advmoe.models import classifiers
from advmoe.training.baselines import specs
from advmoe.training.batch_attacks import CleanBatches, FgsmBatches, PgdBatches, TradesBatches
from advmoe.training.flops import FlopsPerImage, measure_flops
from advmoe.training.joint import MixtureTask

PGD = {"kind": "pgd", "steps": 4, "step_size": 0.5, "restarts": 2, "loss": "ce", "targets": 0}
TRADES = {"kind": "trades", "steps": [2], "step_size": 0.25, "beta": 6.0}
EACH = FlopsPerImage(forward=2, pixels=3, learning=7)


def prepare(**source: Any) -> PrepareSettings:
    splits = {"pool": 270, "validation": 180, "test": 360}
    return validate({"source": source, "splits": splits}, PrepareSettings, "prepare")


@pytest.fixture
def small(inputs_only: Path, edit: Edit) -> Params:
    """Three experts of two channels."""
    del inputs_only  # the test runs inside
    edit({
        "model.width": 2,
        "train.experts": ["clean", "pgd-1", "fgsm-1"],
        "train.gate.width": 2,
        "evaluate.limit": 10,
        "evaluate.limits": {},
        "evaluate.attacks": {"pgd": PGD},
        "evaluate.experts": ["pgd"],
        "evaluate.presets": [],
        "evaluate.grid.epsilons": [0.1],
        "evaluate.grid.attack": {"kind": "fgsm"},
        "evaluate.minimal": {"kind": "fab-t", "steps": 3, "targets": 1, "restarts": 1},
    })  # fmt: skip
    return schema.load_params()


# ---- the formula


@pytest.mark.parametrize(
    ("adversary", "expected"),
    [
        (CleanBatches(kind="clean"), 7),
        (FgsmBatches(kind="fgsm", epsilons=(0.1, 0.2)), 5 + 7),
        (PgdBatches(kind="pgd", steps=(5, 10), step_size=0.5), 7.5 * 5 + 7),
        (TradesBatches(kind="trades", steps=(4,), step_size=0.5, beta=6.0), 4 * 5 + 2 + 7),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_an_image_costs_its_attack_and_the_learning(adversary: Any, expected: float) -> None:
    assert specs.flops_per_training_image(EACH, adversary, 1) == expected
    assert specs.flops_per_training_image(EACH, adversary, 2) == expected + 7


def test_a_stage_costs_its_epochs_and_the_looks_at_the_validation_split(small: Params) -> None:
    forecast = Forecast(small)
    job = {job.stage: job for job in forecast.jobs()}["pretrain@pgd-1"]
    each, recipe = forecast.expert.flops_per_image, small.pretrain
    assert job.passes == 7.5
    assert job.training_flops == recipe.epochs * 987 * (7.5 * (each.forward + each.pixels) + each.learning)
    looks = (1 + recipe.validation.steps) * (each.forward + each.pixels) + 4 * each.forward
    assert job.evaluation_flops == recipe.epochs * 180 * looks
    assert job.operations == job.training_flops + job.evaluation_flops


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"own_loss": 1.0},
        {"recipe": {"kind": "mart", "weight": 5.0}},
        {"recipe": {"kind": "mutual", "weight": 1.0}},
        {"recipe": {"kind": "igat", "alpha": 0.6, "beta": 1.25}},
        {"recipe": {"kind": "adp", "alpha": 2.0, "beta": 0.5}},
        {"recipe": {"kind": "mart-adp", "alpha": 2.0, "beta": 0.5, "weight": 5.0}},
        {"adversary": TRADES},
    ],
    ids=str,
)
def test_a_mixture_costs_what_all_of_it_counted_at_once_does(small: Params, changes: dict[str, Any]) -> None:
    content = small.model_dump(mode="json")
    params = validate(content | {"train": content["train"] | changes}, Params, "params.yaml")
    forecast = Forecast(params)
    model = classifiers.build(specs.paper_mixture(params.model, params.train), forecast.sizes.facts, 0)
    learner = MixtureTask(model, params.train)  # type: ignore[arg-type]
    whole, summed = measure_flops(learner, *forecast._random_batch(2)), forecast.mixture.flops_per_image
    assert asdict(summed) == pytest.approx(asdict(whole), rel=3e-4)  # but for the gate's last layer


def test_an_expert_that_learns_by_trades_is_dearer_and_no_other_for_it(small: Params) -> None:
    content = small.model_dump(mode="json")
    dear = {"seed": 0, "adversary": {**TRADES, "steps": [3]}}
    same = {"seed": 1, "adversary": {"kind": "pgd", "steps": [3], "step_size": 0.25}}
    experts = {"clean": dear, "pgd-1": same, "fgsm-1": same}
    params = validate(content | {"experts": experts}, Params, "params.yaml")
    forecast = Forecast(params)
    jobs = {job.stage: job for job in forecast.jobs()}
    each = {name: jobs[f"pretrain@{name}"].network.flops_per_image for name in experts}
    assert each["pgd-1"] == each["fgsm-1"] == forecast.expert.flops_per_image
    assert each["clean"].learning == pytest.approx(2 * each["pgd-1"].learning, rel=0.01)


def test_the_fair_comparators_cost_what_they_are_to_match(small: Params) -> None:
    profile = YAML().load(ROOT / "profiles" / "digits-full.yaml")
    entries = {**profile["baseline"], **YAML().load(ROOT / "params.yaml")["baseline"]}
    taught = {"kind": "distilled", "alpha": 0.8}
    entries["distilled"] = {key: value for key, value in entries["adversarial"].items() if key != "match"} | taught
    content = resolve_adversaries(small.model_dump(mode="json") | {"baseline": entries})
    params = validate(content, Params, "params.yaml")
    jobs = {job.stage: job for job in Forecast(params).jobs()}
    mixture = jobs["train"].operations + sum(jobs[f"pretrain@{name}"].operations for name in params.train.experts)
    assert jobs["baseline@equal-passes"].operations == mixture
    assert jobs["baseline@uniform"].operations == jobs["train"].operations
    assert jobs["baseline@trades"].operations > 1.1 * jobs["baseline@adversarial"].operations
    student, plain = (jobs[f"baseline@{name}"].network.flops_per_image for name in ("distilled", "adversarial"))
    assert student.forward == plain.forward
    assert student.learning > 2 * plain.learning + 0.9 * jobs["train"].network.flops_per_image.forward
    wide, mixture_flops = (jobs[name].network.flops_per_image for name in ("baseline@equal-parameters", "train"))
    assert wide.forward / mixture_flops.forward == pytest.approx(1, abs=0.3)


def test_evaluation_is_every_attack_on_images_that_none_fells(small: Params) -> None:
    """By hand: PGD with two restarts, 10 forwards and 8 back; the grid's FGSM and the search, 1 + 4 and 1 + 3."""
    forecast = Forecast(small)
    jobs = {job.stage: job for job in forecast.jobs()}

    def met(each: FlopsPerImage, judged: bool) -> int:
        pgd = 10 * each.forward + 8 * each.pixels
        return 10 * (pgd + judged * (6 * each.forward + 4 * each.pixels))

    mixture, expert = forecast.mixture.flops_per_image, forecast.expert.flops_per_image
    baselines = [jobs[f"baseline@{name}"].network.flops_per_image for name in small.evaluate.baselines]
    expected = met(mixture, True) + 2 * met(mixture, False) + 6 * met(expert, False)
    assert jobs["evaluate, at most"].operations == expected + sum(met(each, True) for each in baselines)


# ---- the images


def test_sizes_of_what_can_be_downloaded_are_known() -> None:
    whole = split_sizes(prepare(kind="cifar10", per_class=None, test_per_class=None))
    assert (whole.train, whole.validation, whole.test) == (50_000 - 450, 180, 360)
    assert (whole.facts.channels, whole.facts.height, whole.facts.classes) == (3, 32, 10)
    assert split_sizes(prepare(kind="cifar10", per_class=100, test_per_class=20)).train == 1000 - 450
    assert split_sizes(prepare(kind="digits")).train == 987


def test_splits_that_leave_nothing_to_train_on_have_no_price(small: Params) -> None:
    splits = small.prepare.splits.model_copy(update={"validation": 1500})
    wanted = 1500 + splits.pool + (splits.test or 0)
    assert wanted >= 1797
    with pytest.raises(UserError, match=rf"^prepare.splits: {wanted} images requested, but there are 1797 and "):
        split_sizes(small.prepare.model_copy(update={"splits": splits}))


def test_other_sources_must_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `dvc repro prepare`"):
        split_sizes(prepare(kind="folder", path="data/images", size=8, channels=1))


@pytest.mark.usefixtures("project")
def test_what_is_prepared_is_counted() -> None:
    found = split_sizes(prepare(kind="folder", path="data/images", size=8, channels=1))
    assert (found.train, found.validation, found.test, found.facts.height) == (987, 180, 360, 8)


# ---- against what was measured


def test_operations_are_those_that_the_last_run_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, where nothing is drawn; else within four standard errors of the draws."""
    monkeypatch.chdir(ROOT)
    params = schema.load_params()
    forecast = Forecast(params)
    jobs = {job.stage: job for job in forecast.jobs()}
    steps = params.pretrain.epochs * math.ceil(forecast.sizes.train / params.pretrain.batch_size)
    each = forecast.expert.flops_per_image
    for name, student in params.experts.items():
        counted = json.loads(paths.metrics("pretrain", name).read_text())["cost"]["training_flops"]
        drawn = student.adversary.steps if isinstance(student.adversary, PgdBatches) else (0,)
        spread = (max(drawn) - min(drawn)) / 2 * forecast.sizes.train * params.pretrain.epochs / math.sqrt(steps)
        assert abs(jobs[f"pretrain@{name}"].training_flops - counted) <= 4 * spread * (each.forward + each.pixels), name


def test_the_rate_of_this_machine_is_measured_on_training_steps(small: Params) -> None:
    ticks = iter(range(10**6))
    forecast = Forecast(small, lambda: float(next(ticks)))  # every step takes a second
    assert forecast.expert.speed() == small.pretrain.batch_size * specs.flops_per_training_image(
        forecast.expert.flops_per_image, PgdBatches(kind="pgd", steps=(3,), step_size=0.25), 1
    )


def test_the_first_step_is_not_timed() -> None:
    calls: list[float] = []

    def step() -> None:
        calls.append(2.0)

    assert time_step(step, lambda: sum(calls)) == 2.0


# ---- what is shown


def test_hours_are_operations_over_the_rate() -> None:
    def never() -> float:
        raise AssertionError("measured, though a rate was given")

    slow, fast = NetworkCost(EACH, lambda: 1e12), NetworkCost(EACH, lambda: 4e12)
    jobs = [StageCost("a", 2.0, 3.6e15, 0.0, slow), StageCost("b", 1.0, 7.0e15, 0.2e15, fast)]
    assert [row[-1] for row in rows(jobs, None)] == ["1", "0.5", "1.5"]
    given = [
        StageCost(job.stage, job.passes, job.training_flops, job.evaluation_flops, NetworkCost(EACH, never))
        for job in jobs
    ]
    assert [row[-1] for row in rows(given, 2e12)] == ["0.5", "1", "1.5"]
    assert rows(given, 2e12)[-1][2] == "10.8"


@pytest.mark.usefixtures("small")
def test_the_command(advmoe: Advmoe) -> None:
    ran = advmoe("cost", "--flops", "1e12")
    assert ran.code == 0, ran.err
    for stage in ("pretrain@pgd-1", "train", "baseline@adversarial", "evaluate, at most", "all"):
        assert stage in ran.out


@pytest.mark.usefixtures("inputs_only")
def test_the_command_refuses_a_params_file_that_is_wrong(advmoe: Advmoe, edit: Edit) -> None:
    edit({"epsilon": 8})
    assert "epsilon" in sentence(advmoe("cost"))

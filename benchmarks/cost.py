"""Accuracy of the cost forecast: `python -m benchmarks.cost` trains four networks of params.yaml as the pipeline does,
and compares FLOPs and seconds with those of `advmoe cost`.

Seconds are CPU seconds on one thread, because other processes may use the same cores; on a GPU wall-clock seconds.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from advmoe.config import schema
from advmoe.config.cost_forecast import Forecast, StageCost
from advmoe.config.schema import Params
from advmoe.core import console, paths
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split, SplitName
from advmoe.models import classifiers
from advmoe.models.classifiers import PlainArchitecture
from advmoe.runtime import machine
from advmoe.training.job import TrainingResult
from advmoe.training.joint import JointRun, train_mixture
from advmoe.training.single import SingleRun, train_single

EXPERTS = ("clean", "fgsm-1", "pgd-1")  # one of each kind of adversary


def main() -> None:
    """Forecasts, trains, and prints the comparison."""
    machine.prepare_torch()
    torch.set_num_threads(1)
    params = schema.load_params()
    clock = time.perf_counter if machine.device().type == "cuda" else time.process_time
    forecast = Forecast(params, clock)
    jobs = {job.stage: job for job in forecast.jobs()}
    data = images(forecast)
    rows = [
        _row(jobs[f"pretrain@{name}"], *_time_training(partial(expert, params, data, name), clock))
        for name in EXPERTS
        if name in params.experts
    ]
    rows.append(_row(jobs["train"], *_time_training(partial(mixture, params, data), clock)))
    columns = ["stage", "GFLOP forecast", "counted", "ratio", "seconds forecast", "measured", "ratio"]
    console.table("forecast of `advmoe cost` and measured cost", columns, rows)


def images(forecast: Forecast) -> Dataset:
    """Returns the prepared data set if it has these sizes, else random images of the same cost."""
    if paths.DATASET.exists():
        data = dataset.load(paths.DATASET)
        if len(data["train"]) == forecast.sizes.train and data.facts.height == forecast.sizes.facts.height:
            return data
    facts, stream = forecast.sizes.facts, machine.generator("cost")
    shape = (facts.channels, facts.height, facts.width)
    splits: dict[SplitName, Split] = {}
    sizes: dict[SplitName, int] = {"train": forecast.sizes.train, "validation": forecast.sizes.validation}
    for name, count in sizes.items():
        pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=stream)
        splits[name] = Split(pixels, torch.arange(count) % facts.classes, torch.arange(count))
    return Dataset(splits, facts, "")


def expert(params: Params, data: Dataset, name: str) -> TrainingResult:
    """Trains an expert as `advmoe pretrain` does."""
    spec = params.experts[name]
    epsilon = params.epsilon if spec.uses_threat_epsilon else None
    return train_single(SingleRun(name, spec, params.model, data, params.pretrain, params.seed, epsilon))


def mixture(params: Params, data: Dataset) -> TrainingResult:
    """Trains the mixture as `advmoe train` does, from untrained experts."""
    plain = PlainArchitecture(kind="plain", backbone=params.model)
    experts = [classifiers.build(plain, data.facts, name) for name in params.train.experts]
    trained, _ = train_mixture(JointRun(experts, params.model, data, params.train, params.seed, params.epsilon))
    return trained


def _time_training(work: Callable[[], TrainingResult], clock: Callable[[], float]) -> tuple[TrainingResult, float]:
    started = clock()
    return work(), clock() - started


def _row(job: StageCost, trained: TrainingResult, seconds: float) -> list[str]:
    counted = trained.cost.training_flops
    expected = job.operations / job.network.speed()
    return [
        job.stage,
        f"{job.training_flops / 1e9:,.0f}",
        f"{counted / 1e9:,.0f}",
        f"{job.training_flops / counted:.2f}",
        f"{expected:.1f}",
        f"{seconds:.1f}",
        f"{expected / seconds:.2f}",
    ]


if __name__ == "__main__":
    main()

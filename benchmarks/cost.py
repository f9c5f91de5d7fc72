"""Is the forecast right? `python -m benchmarks.cost` trains four networks of params.yaml as the pipeline would, and
sets what `advmoe cost` says beside what they took: operations and seconds.

Seconds are of the CPU, on one thread, because others may compute on the same cores; on a GPU the clock is the wall's.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from advmoe.config import schema
from advmoe.config.cost_forecast import Forecast, Job
from advmoe.config.schema import Params
from advmoe.core import console, paths
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split, SplitName
from advmoe.models import classifiers
from advmoe.models.classifiers import Plain
from advmoe.runtime import machine
from advmoe.training.joint import train_mixture
from advmoe.training.single import train_single
from advmoe.training.trainer import TrainingResult

EXPERTS = ("clean", "fgsm-1", "pgd-1")  # one of each kind


def main() -> None:
    """Forecast, train, compare."""
    machine.prepare_torch()
    torch.set_num_threads(1)
    params = schema.load_params()
    clock = time.perf_counter if machine.device().type == "cuda" else time.process_time
    forecast = Forecast(params, clock)
    jobs = {job.stage: job for job in forecast.jobs()}
    data = images(forecast)
    rows = [
        _row(jobs[f"pretrain@{name}"], *_took(partial(expert, params, data, name), clock))
        for name in EXPERTS
        if name in params.experts
    ]
    rows.append(_row(jobs["train"], *_took(partial(mixture, params, data), clock)))
    columns = ["stage", "GFLOP forecast", "counted", "ratio", "seconds forecast", "measured", "ratio"]
    console.table("what `advmoe cost` says, and what it took", columns, rows)


def images(forecast: Forecast) -> Dataset:
    """The prepared images if they are of these sizes, else noise: it costs the same."""
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
    """As `pretrain` trains it."""
    student = params.experts[name]
    epsilon = params.epsilon if student.meets_threat_model else None
    return train_single(name, student, params.model, data, params.pretrain, seed=params.seed, epsilon=epsilon)


def mixture(params: Params, data: Dataset) -> TrainingResult:
    """As `train` does, from experts that know nothing."""
    plain = Plain(kind="plain", backbone=params.model)
    experts = [classifiers.build(plain, data.facts, name) for name in params.train.experts]
    trained, _ = train_mixture(experts, params.model, data, params.train, seed=params.seed, epsilon=params.epsilon)
    return trained


def _took(work: Callable[[], TrainingResult], clock: Callable[[], float]) -> tuple[TrainingResult, float]:
    started = clock()
    return work(), clock() - started


def _row(job: Job, trained: TrainingResult, seconds: float) -> list[str]:
    counted = trained.cost.training_flops
    expected = job.operations / job.network.speed()
    return [
        job.stage,
        f"{job.training / 1e9:,.0f}",
        f"{counted / 1e9:,.0f}",
        f"{job.training / counted:.2f}",
        f"{expected:.1f}",
        f"{seconds:.1f}",
        f"{expected / seconds:.2f}",
    ]


if __name__ == "__main__":
    main()

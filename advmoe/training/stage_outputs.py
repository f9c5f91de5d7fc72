"""Writes the outputs of a training stage: the artifact, its metrics and its history; prints its alarms."""

from collections.abc import Mapping

from pydantic import BaseModel

from advmoe.core import console, files, paths
from advmoe.data.dataset import DatasetInfo
from advmoe.models import classifiers
from advmoe.models.classifiers import MixtureArchitecture, PlainArchitecture
from advmoe.runtime import distributed
from advmoe.training.job import TrainingResult


def write_outputs(
    stage: str,
    name: str,
    result: TrainingResult,
    architecture: PlainArchitecture | MixtureArchitecture,
    facts: DatasetInfo,
    *,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
    seed: int,
) -> None:
    """Writes a trained classifier with its metrics and history, on rank 0. The artifact is written last: where it
    exists, the other files do.
    """
    if not distributed.is_rank0():
        return
    metrics = {"validation": result.kept, "alarms": result.alarms, "cost": result.cost.as_dict()}
    files.write_json(paths.metrics(stage, name), metrics)
    files.write_csv(paths.plots(stage, name), result.history)
    classifiers.save(
        paths.artifact(stage, name),
        result.model,
        architecture,
        facts,
        params={key: _jsonable(value) for key, value in params.items()},
        inputs=inputs,
        seed=seed,
        metrics=metrics,
        seconds=result.seconds,
    )
    for alarm in result.alarms:
        console.warn(alarm)
    console.info(f"written to {paths.artifact(stage, name)} after {result.seconds:.0f} s")


def _jsonable(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

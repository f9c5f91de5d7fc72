"""What every training stage leaves behind: the artifact, its metrics, its history, and its alarms out loud."""

from collections.abc import Mapping

from pydantic import BaseModel

from advmoe.core import console, files, paths
from advmoe.data.dataset import Facts
from advmoe.models import classifiers
from advmoe.models.classifiers import Mixture, Plain
from advmoe.runtime import distributed
from advmoe.training.trainer import TrainingResult


def write_outputs(
    stage: str,
    name: str,
    trained: TrainingResult,
    architecture: Plain | Mixture,
    facts: Facts,
    *,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
    seed: int,
) -> None:
    """Write a trained classifier with its numbers. The artifact comes last: where it is, all of it is. Of several
    processes the first writes.
    """
    if not distributed.is_rank0():
        return
    metrics = {"validation": trained.kept, "alarms": trained.alarms, "cost": trained.cost.as_dict()}
    files.write_json(paths.metrics(stage, name), metrics)
    files.write_csv(paths.plots(stage, name), trained.history)
    classifiers.save(
        paths.artifact(stage, name),
        trained.model,
        architecture,
        facts,
        params={key: _plain(value) for key, value in params.items()},
        inputs=inputs,
        seed=seed,
        metrics=metrics,
        seconds=trained.seconds,
    )
    for alarm in trained.alarms:
        console.warn(alarm)
    console.say(f"written to {paths.artifact(stage, name)} after {trained.seconds:.0f} s")


def _plain(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

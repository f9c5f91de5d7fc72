"""What a training run is at one moment, to be killed and go on, to the last bit the same.

A state holds every tensor and every stream of random numbers. Of the order of images it holds where the epoch's draws
began: they are drawn again from there.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.runtime.checkpoints.manager import is_generator_state, tensor_specs
from advmoe.runtime.checkpoints.storage import Checkpoint, flatten, unflatten
from advmoe.training.config import ValidatedTrainingConfig

if TYPE_CHECKING:
    from advmoe.training.trainer import Trainer

STREAMS = ("shuffle", "adversary", "noise")  # of random numbers
LOSSES = "epoch/losses"  # in a file of state
NOT_THIS_RUN = "is no state of this run"

Row = dict[str, Any]


class Progress(BaseModel):
    """What a file of state holds beside tensors: `work` counts forward passes, backward passes and images learned."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    history: list[dict[str, int | float]]
    work: Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]
    seconds: NonNegativeFloat


def trainer_checkpoint(run: "Trainer") -> Checkpoint:
    """All that changes from step to step. Raises UserError when the loss or the weights are no longer finite."""
    run.check()
    momenta = {
        f"{number}": run.optimizer.state[parameter]["momentum_buffer"]
        for number, parameter in enumerate(_parameters(run))
        if "momentum_buffer" in run.optimizer.state[parameter]
    }
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": run.learner.model.state_dict(),
        "average": run.average.state_dict() if run.average is not None else {},
        "momentum": momenta,
        "weights": run.weights,
        "learner": run.learner.state(),
        "streams": {name: getattr(run, name).get_state() for name in STREAMS} | {"shuffle": run.epoch_began},
        "epoch": {"losses": torch.stack(run.losses)} if run.losses else {},
    }
    values = {
        "history": run.history,
        "work": [run.passes.forward, run.passes.backward, run.learned],
        "seconds": run.seconds,
    }
    return Checkpoint(flatten(parts), values)


def load_trainer_checkpoint(run: "Trainer", snapshot: Checkpoint) -> None:
    """Be as at that moment. Raises UserError, and changes nothing, for what is no state of this run."""
    place, progress, parts = run.images.device, _progress(snapshot), unflatten(snapshot.tensors)
    _refuse_alien(run, snapshot.tensors, progress.history)
    run.learner.restore({name: tensor.to(place) for name, tensor in parts["learner"].items()})
    run.learner.model.load_state_dict(parts["model"])
    if run.average is not None:
        run.average.load_state_dict(parts["average"])
    run.weights = {name: tensor.to(place) for name, tensor in parts["weights"].items()}
    for name in STREAMS:
        getattr(run, name).set_state(parts["streams"][name])
    run.epoch_began = run.shuffle.get_state()
    run.losses = list(parts["epoch"]["losses"].to(place)) if parts["epoch"] else []
    run.history = progress.history
    run.kept = run.best()
    run.passes.forward, run.passes.backward, run.learned = progress.work
    run.started -= progress.seconds
    _restore_optimizer(run, parts["momentum"])


def _refuse_alien(run: "Trainer", tensors: Mapping[str, Tensor], history: list[Row]) -> None:
    """Raises UserError unless all is there, nothing else is, and types and shapes are those of this run."""
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("learner/")}
    sound = (
        tensor_specs(found) == tensor_specs(_like(run, found, history))
        and all(tensor.isfinite().all() for tensor in found.values())
        and all(is_generator_state(found[f"streams/{name}"]) for name in STREAMS)
        and _is_history(run, history, found.get(LOSSES, torch.zeros(0)).numel())
    )
    if not sound:
        raise UserError(NOT_THIS_RUN)


def _like(run: "Trainer", found: Mapping[str, Tensor], history: list[Row]) -> dict[str, Tensor]:
    """Tensors of the names, types and shapes that the state of this run has after such a history."""
    now = {name: tensor for name, tensor in trainer_checkpoint(run).tensors.items() if not name.startswith("learner/")}
    momenta = flatten({"momentum": {f"{number}": each for number, each in enumerate(_parameters(run))}})
    weights = flatten({"weights": run.model.state_dict()}) if history else {}
    losses = {LOSSES: torch.zeros(found[LOSSES].numel())} if LOSSES in found else {}
    return now | {name: each for name, each in momenta.items() if name in found} | weights | losses


def _is_history(run: "Trainer", history: list[Row], steps: int) -> bool:
    """Whether rows are those of the first epochs, and some steps can follow."""
    recipe = run.course.recipe
    watched = {"clean", "fgsm", "pgd", run.course.select_by, *run.learner.columns}
    columns = {"epoch", "loss"} | (watched if isinstance(recipe, ValidatedTrainingConfig) else set())
    return (
        all(columns <= row.keys() for row in history)
        and [row["epoch"] for row in history] == list(range(1, len(history) + 1))
        and len(history) <= recipe.epochs
        and steps <= (run.steps_per_epoch if len(history) < recipe.epochs else 0)
    )


def _restore_optimizer(run: "Trainer", momenta: Mapping[str, Tensor]) -> None:
    for number, parameter in enumerate(_parameters(run)):
        if f"{number}" in momenta:  # laid out in memory as the parameter is, as PyTorch itself does
            buffer = torch.empty_like(parameter).copy_(momenta[f"{number}"]).detach()
            run.optimizer.state[parameter]["momentum_buffer"] = buffer
    done = len(run.history) * run.steps_per_epoch + len(run.losses)
    run.scheduler.load_state_dict(run.scheduler.state_dict() | {"last_epoch": done, "_step_count": done + 1})
    for group, peak in zip(run.optimizer.param_groups, run.scheduler.base_lrs, strict=True):
        group["lr"] = peak * run.rate(done)


def _parameters(run: "Trainer") -> list[nn.Parameter]:
    return [parameter for group in run.optimizer.param_groups for parameter in group["params"]]


def _progress(snapshot: Checkpoint) -> Progress:
    try:
        return Progress.model_validate(snapshot.values)
    except ValidationError as error:
        raise UserError(NOT_THIS_RUN) from error

"""The steps that all threat experiments share: output paths, resume, and where results are written.

The experiments are `run_experiment` in `poisoning/experiment.py`, `extraction/experiment.py` and
`membership/experiment.py`; several networks or victims at a time are `advmoe.runtime.parallel.parallel_map`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from advmoe.core import console
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.manager import Resumable, StepCallback, checkpointing
from advmoe.runtime.checkpoints.storage import Checkpoint

T = TypeVar("T")


@dataclass(frozen=True)
class OutputPaths:
    """Where an experiment writes its results.

    `metrics`: JSON file of means for `dvc metrics`; `runs`: JSON file of all results with their intervals; `models`:
    folder of networks and data sets; `plots`: folder of plot data and images. An experiment without models or plots
    does not create these folders.
    """

    metrics: Path
    runs: Path
    models: Path
    plots: Path

    @classmethod
    def in_folder(cls, folder: Path) -> "OutputPaths":
        """Returns paths that all lie in one folder."""
        return cls(folder / "metrics.json", folder / "runs.json", folder / "models", folder)


def load_or_compute(
    checkpoint_dir: Path | None,
    label: str,
    facts: Sequence[object],
    compute: Callable[[], Checkpoint],
    restore: Callable[[Checkpoint], T],
) -> T:
    """Returns the result of one step, `restore(checkpoint)`.

    The checkpoint is loaded if an interrupted run has saved it under `label` and `facts`, else computed and saved.
    """
    return storage.load_or_compute(workdir.checkpoint_path(checkpoint_dir, label, *facts), compute, restore)


def resumable_loop(
    checkpoint_dir: Path | None, label: str, facts: Sequence[object], work: Resumable, title: str
) -> AbstractContextManager[StepCallback]:
    """Restores `work` from the checkpoint under `label` and `facts`, and saves it in the callback that is yielded.

    `title` names the work in messages. See `advmoe.runtime.checkpoints.manager.checkpointing`.
    """
    return checkpointing(work, title, workdir.checkpoint_path(checkpoint_dir, label, *facts))


def print_outputs(outputs: OutputPaths, *folders: Path) -> None:
    """Prints where the results are: both JSON files and the given folders."""
    written = [str(outputs.metrics), str(outputs.runs), *(f"{folder}/" for folder in folders)]
    console.info(f"results: {', '.join(written)}")

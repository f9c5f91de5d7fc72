"""`advmoe check`: is params.yaml sound, does dvc.yaml fit it, is this machine set up, and what would run?"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advmoe.config.schema import Params, load_params
from advmoe.core import files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import read_yaml
from advmoe.runtime.machine import device
from advmoe.threats.extraction.victims import file_of

DVC_FILE = Path("dvc.yaml")
RUNNING = "Running stage '"


def check() -> list[str]:
    """The stages that `dvc repro` would run now. Raises UserError at the first thing that is wrong."""
    params = load_params()
    check_dvc_file(params)
    device()
    return pending_stages()


def check_dvc_file(params: Params) -> None:
    """DVC re-runs a stage when a file it lists has changed: every expert and baseline in use must be listed.

    Raises UserError naming the stage and the line to add.
    """
    with files.as_written(DVC_FILE):
        deps = _deps(read_yaml(DVC_FILE).get("stages") or {})
    poisoned = {victim for study in params.poison.attacks.values() for victim in study.victims}
    asked = {victim for study in params.extract.attacks.values() for victim in study.victims}
    needed = {
        "train": [paths.artifact("pretrain", name) for name in params.train.experts],
        "evaluate": [
            *(paths.artifact("pretrain", name) for name in params.train.experts),
            *(paths.artifact("baseline", name) for name in params.evaluate.baselines),
        ],
        "poison": [
            *(paths.artifact("pretrain", name) for name in params.train.experts),
            *(paths.artifact("baseline", name) for name in sorted(poisoned & set(params.baseline))),
        ],
        "extract": [file_of(name) for name in sorted(asked)],
        "membership": [file_of(name) for name in sorted(params.membership.victims)],
    }
    for stage, artifacts in needed.items():
        listed = deps.get(stage, frozenset())
        missing = [str(path) for path in artifacts if not {str(path), str(path.parent)} & listed]
        if missing:
            raise UserError(f"{DVC_FILE}: stages.{stage}.deps must list {missing[0]}, or DVC will not see it change")


def _deps(stages: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """By stage the files that DVC watches for it."""
    entries = {stage: entry.get("do", entry) for stage, entry in stages.items() if entry}
    return {stage: frozenset(map(str, entry.get("deps") or [])) for stage, entry in entries.items()}


def pending_stages() -> list[str]:
    """Ask DVC what is out of date, in the order it would run. Raises UserError when DVC cannot say."""
    command = [sys.executable, "-m", "dvc", "repro", "--dry", "--force-downstream"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"dvc: {reason[0].removeprefix('ERROR: ')}")
    return [
        line.removeprefix(RUNNING).partition("'")[0] for line in done.stdout.splitlines() if line.startswith(RUNNING)
    ]

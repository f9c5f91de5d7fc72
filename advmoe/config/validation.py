"""Validates params.yaml, dvc.yaml and the environment, and finds the stages that `dvc repro` would run."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advmoe.config.schema import Params, load_params
from advmoe.core import files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import PARAMS_FILE, read_yaml
from advmoe.core.stage_inputs import all_inputs, content_of, inputs_path
from advmoe.runtime.code_fingerprint import stage_fingerprint
from advmoe.runtime.machine import device

DVC_FILE, LOCK_FILE = Path("dvc.yaml"), Path("dvc.lock")
DERIVING = {"code", "inputs"}  # stages whose outputs, derived from code and params.yaml, are dependencies of the others
RUNNING = "Running stage '"


def check() -> list[str]:
    """Returns the stages that `dvc repro` would run now. Raises UserError for the first problem."""
    params = load_params()
    check_dvc_file(params)
    device()
    return pending_stages()


def check_dvc_file(params: Params) -> None:
    """Checks that each stage lists the artifacts of all experts and baselines that it uses, so that DVC re-runs it.

    Raises UserError naming the stage and the line to add.
    """
    with files.report_malformed(DVC_FILE):
        deps = _deps(read_yaml(DVC_FILE).get("stages") or {})
    poisoned = {victim for study in params.poison.attacks.values() for victim in study.victims}
    stolen = {victim for study in params.extract.attacks.values() for victim in study.victims}
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
        "extract": [paths.model(name) for name in sorted(stolen)],
        "membership": [paths.model(name) for name in sorted(params.membership.victims)],
    }
    for stage, artifacts in needed.items():
        listed = deps.get(stage, frozenset())
        missing = [str(path) for path in artifacts if not {str(path), str(path.parent)} & listed]
        if missing:
            raise UserError(f"{DVC_FILE}: stages.{stage}.deps must list {missing[0]}, or DVC will not see it change")


def _deps(stages: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Returns the dependencies of each stage."""
    entries = {stage: entry.get("do", entry) for stage, entry in stages.items() if entry}
    return {stage: frozenset(map(str, entry.get("deps") or [])) for stage, entry in entries.items()}


def pending_stages() -> list[str]:
    """Returns the stages that `dvc repro` would run, in order. Raises UserError when DVC fails.

    `dvc repro --dry` lists all stages downstream of `code` and `inputs` whenever a file of code or params.yaml changed.
    The outputs of these two are therefore computed here, so that only stages whose code or parameters changed count.
    """
    locked = _locked_stages()
    every = _stage_names()
    if not paths.INPUTS.is_dir() or any(stage not in locked for stage in every):
        # DVC cannot try a run whose stages depend on files that are not written yet
        changed = {stage for stage in every if stage not in locked} | DERIVING | _changed_by_deriving(every)
        if not paths.DATASET.exists():
            changed.add("prepare")
    else:
        every = _dry_run("--force-downstream")
        if not DERIVING & set(every):
            return every
        changed = set(_dry_run()) | _changed_by_deriving(every)
    for stage in every:
        if any(_follows(locked.get(stage), locked.get(other)) for other in changed - DERIVING - {stage}):
            changed.add(stage)
    return [stage for stage in every if stage in changed]


def _changed_by_deriving(stages: Sequence[str]) -> set[str]:
    """Returns the stages whose code fingerprint or parameters have changed since their last run."""
    inputs = all_inputs(read_yaml(PARAMS_FILE))
    changed = set()
    for stage in set(stages) - DERIVING:
        name, _, entry = stage.partition("@")
        code = paths.CODE / f"{name}.sha256"
        values = inputs_path(name, entry or None)
        expected = {code: f"{stage_fingerprint(name)}\n", values: content_of(inputs[values])}
        if any(not path.is_file() or path.read_text() != text for path, text in expected.items()):
            changed.add(stage)
    return changed


def _locked_stages() -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = read_yaml(LOCK_FILE).get("stages") or {} if LOCK_FILE.is_file() else {}
    return stages


def _follows(stage: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Returns whether a stage depends on an output of another, according to their entries in dvc.lock."""
    deps = [Path(dep["path"]) for dep in (stage or {}).get("deps", [])]
    outs = [Path(out["path"]) for out in (other or {}).get("outs", [])]
    return any(dep.is_relative_to(out) or out.is_relative_to(dep) for dep in deps for out in outs)


def _stage_names() -> list[str]:
    return _dvc("stage", "list", "--name-only")


def _dry_run(*options: str) -> list[str]:
    lines = _dvc("repro", "--dry", *options)
    return [line.removeprefix(RUNNING).partition("'")[0] for line in lines if line.startswith(RUNNING)]


def _dvc(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"dvc: {reason[0].removeprefix('ERROR: ')}")
    return done.stdout.splitlines()

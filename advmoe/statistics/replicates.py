"""Groups snapshots into replicates: runs of one method that differ only in their seed."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.references import entry_in_current_form
from advmoe.core.settings import Seed, parse_epsilon, parse_untrusted_yaml, validate
from advmoe.core.snapshots import Snapshot, commit_hash, flatten_keys, read_params
from advmoe.core.stage_inputs import all_inputs, content_of
from advmoe.runtime.machine import evaluation_seed
from advmoe.statistics import evaluation_files
from advmoe.statistics.pairing import Claim, NoEvidence, PairedEvidence, collect_evidence

LOCK = Path("dvc.lock")
STAGES = ("prepare", "pretrain", "train", "baseline", "evaluate")  # the stages that decisions depend on
IGNORED_KEYS = ("seed", "launcher", "report")  # keys of params.yaml in which the runs of one method may differ


@dataclass(frozen=True)
class ReplicateRun:
    """A snapshot with its seed, its evidence by claim, and the params that the runs of its method have in common."""

    snapshot: Snapshot
    seed: int
    params: Mapping[str, Any]
    evidence: Mapping[str, PairedEvidence | NoEvidence]

    def as_dict(self) -> dict[str, Any]:
        """Returns seed, name and commit for JSON."""
        return {"seed": self.seed, "record": self.snapshot.name, "commit": commit_hash(self.snapshot)}


@dataclass(frozen=True)
class Excluded:
    """A snapshot that is excluded, from one claim or from all, and the reason."""

    snapshot_name: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """Returns the entry for JSON."""
        return {"record": self.snapshot_name, "reason": self.reason}


def collect_runs(
    snapshots: Iterable[Snapshot], claims: Mapping[str, Claim]
) -> tuple[list[ReplicateRun], list[Excluded]]:
    """Reads the snapshots; those without usable results are returned as excluded."""
    runs: list[ReplicateRun] = []
    excluded: list[Excluded] = []
    for snapshot in snapshots:
        try:
            runs.append(_read_run(snapshot, claims))
        except UserError as error:
            excluded.append(Excluded(snapshot.name, str(error).removeprefix(f"{snapshot.name}: ")))
    return runs, excluded


def group_by_params(runs: Sequence[ReplicateRun]) -> tuple[list[list[ReplicateRun]], list[Excluded]]:
    """Groups runs with equal params, the largest group first. A second run of a seed is excluded as a duplicate."""
    groups: list[list[ReplicateRun]] = []
    excluded: list[Excluded] = []
    for run in runs:
        group = next((group for group in groups if group[0].params == run.params), [])
        duplicate = next((other for other in group if other.seed == run.seed), None)
        if duplicate is not None:
            reason = f"seed {run.seed} is counted already, from {duplicate.snapshot.name}"
            excluded.append(Excluded(run.snapshot.name, reason))
            continue
        if not group:
            groups.append(group)
        group.append(run)
    return sorted(groups, key=lambda group: -len(group)), excluded


def check_same_setup(runs: Sequence[ReplicateRun]) -> None:
    """Raises UserError when the runs differ in their data or their threat model."""
    for key, what in (("prepare", "data sets"), ("epsilon", "threat models")):
        for run in runs[1:]:
            if run.params.get(key) != runs[0].params.get(key):
                names = f"{run.snapshot.name} and {runs[0].snapshot.name}"
                raise UserError(f"{names} cannot be aggregated: their {what} differ ('{key}' of params.yaml)")


def varying_keys(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the dotted keys whose values are not the same in all params."""
    leaves = [flatten_keys(each) for each in params]
    keys = dict.fromkeys(key for each in leaves for key in each)
    return [key for key in keys if any(key not in each or each[key] != leaves[0].get(key) for each in leaves)]


def _read_run(snapshot: Snapshot, claims: Mapping[str, Claim]) -> ReplicateRun:
    params = read_params(snapshot)
    where = f"{snapshot.name}: params.yaml"
    seed = validate(params.get("seed"), Seed, where, "seed")
    try:
        epsilon = parse_epsilon(params.get("epsilon"))  # 8/255 and its decimals are one threat model
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    _check_lock(snapshot, params)
    _check_evaluation_terms(snapshot, claims, seed, epsilon)
    evidence = {name: collect_evidence(snapshot, claim, seed) for name, claim in claims.items()}
    untested = [found for found in evidence.values() if isinstance(found, NoEvidence) and found.status == "not judged"]
    if untested and len(untested) == len(evidence):
        raise UserError(untested[0].reason)
    shared = {key: value for key, value in params.items() if key not in IGNORED_KEYS}
    return ReplicateRun(snapshot, seed, shared | {"epsilon": epsilon}, evidence)


def _check_lock(snapshot: Snapshot, params: Mapping[str, Any]) -> None:
    """Raises UserError when params.yaml was edited after the run: its results would be attributed to other params.

    dvc.lock holds a hash of the parameters that each stage last ran with, in earlier versions the parameters. Without a
    dvc.lock nothing is checked.
    """
    stages = _locked_stages(snapshot)
    try:
        inputs = all_inputs(params) if any(map(_inputs_hash, stages.values())) else {}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{snapshot.name}: params.yaml is not one of this version of advmoe") from error
    for stage, entry in stages.items():
        path, locked = _inputs_hash(entry) or (None, "")
        if path is not None and (path not in inputs or _md5(content_of(inputs[path])) != locked):
            raise UserError(f"{snapshot.name}: {stage} ran with other parameters than params.yaml has; run `dvc repro`")
        _check_locked_params(snapshot, stage, entry.get("params", {}).get("params.yaml", {}), params)


def _check_locked_params(snapshot: Snapshot, stage: str, locked: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """The same for a dvc.lock of an earlier version, which holds the parameters themselves."""
    leaves = flatten_keys(params)
    for key, value in locked.items():
        section, _, name = key.partition(".")
        if section in {"experts", "baseline"}:
            value = entry_in_current_form(value) if name else {n: entry_in_current_form(e) for n, e in value.items()}  # noqa: PLW2901
        current = {leaf: leaves[leaf] for leaf in leaves if leaf == key or leaf.startswith(f"{key}.")}
        if current and current != flatten_keys({key: value}):
            raise UserError(f"{snapshot.name}: {stage} ran with another '{key}' than params.yaml has; run `dvc repro`")


def _inputs_hash(entry: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The file of parameters that a stage depends on, and its MD5 hash; None for a stage without one."""
    for dep in entry.get("deps", []):
        path = Path(dep["path"])
        if path.is_relative_to(paths.INPUTS):
            return path, dep["md5"]
    return None


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()  # DVC's hash of a file


def _locked_stages(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The stages of dvc.lock that decisions come from."""
    content = snapshot.read(LOCK)
    try:
        stages = parse_untrusted_yaml(content.decode())["stages"] if content is not None else {}
        for entry in stages.values():
            _inputs_hash(entry)
            entry.get("params", {}).get("params.yaml", {}).items()
        return {name: entry for name, entry in stages.items() if name.partition("@")[0] in STAGES}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{snapshot.name}: {LOCK} cannot be read") from error


def _check_evaluation_terms(snapshot: Snapshot, claims: Mapping[str, Claim], seed: int, epsilon: float) -> None:
    """Raises UserError when a report was made with another seed or epsilon than params.yaml has."""
    for model in {model: None for claim in claims.values() for model in (claim.model, claim.over)}:
        if snapshot.read(evaluation_files.path(model)) is None:
            continue  # collect_evidence reports the missing file
        report = evaluation_files.read(snapshot, model)
        if report.terms.seed != evaluation_seed(seed) or report.epsilon != epsilon:
            raise UserError(
                f"{snapshot.name}: results on {model} were computed with another seed or epsilon than params.yaml has"
            )

"""Records as replicates: which of them hold results, of which seed, and which belong to one method."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.core.errors import UserError
from advmoe.core.settings import Seed, parse_epsilon, parse_yaml, validate
from advmoe.core.snapshots import Snapshot, commit_of, dotted, read_params
from advmoe.runtime.machine import evaluation_seed
from advmoe.statistics import evaluation_files
from advmoe.statistics.pairing import Claim, Evidence, Refusal, weigh

LOCK = Path("dvc.lock")
STAGES = ("prepare", "pretrain", "train", "baseline", "evaluate")  # what decisions come from
NO_RESULT = ("seed", "launcher", "report")  # keys of params.yaml in which the runs of one method may differ


@dataclass(frozen=True)
class ReplicateRun:
    """A record, its seed, what it gives each claim, and the params that it shares with other runs of its method."""

    record: Snapshot
    seed: int
    params: Mapping[str, Any]
    weighed: Mapping[str, Evidence | Refusal]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: where to find it again."""
        return {"seed": self.seed, "record": self.record.name, "commit": commit_of(self.record)}


@dataclass(frozen=True)
class Excluded:
    """A record that does not count, for one claim or at all, and why."""

    record: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"record": self.record, "reason": self.reason}


def gather(records: Iterable[Snapshot], claims: Mapping[str, Claim]) -> tuple[list[ReplicateRun], list[Excluded]]:
    """The records that hold results, and the others."""
    runs: list[ReplicateRun] = []
    left: list[Excluded] = []
    for record in records:
        try:
            runs.append(_run(record, claims))
        except UserError as error:
            left.append(Excluded(record.name, str(error).removeprefix(f"{record.name}: ")))
    return runs, left


def grouped(runs: Sequence[ReplicateRun]) -> tuple[list[list[ReplicateRun]], list[Excluded]]:
    """Runs of equal params together, the largest group first. A seed counts once: a copied run would look like many."""
    groups: list[list[ReplicateRun]] = []
    left: list[Excluded] = []
    for run in runs:
        group = next((group for group in groups if group[0].params == run.params), [])
        twin = next((other for other in group if other.seed == run.seed), None)
        if twin is not None:
            left.append(Excluded(run.record.name, f"seed {run.seed} is counted already, from {twin.record.name}"))
            continue
        if not group:
            groups.append(group)
        group.append(run)
    return sorted(groups, key=lambda group: -len(group)), left


def check_one_question(runs: Sequence[ReplicateRun]) -> None:
    """Raises UserError when runs that somebody put together have other data or another threat model."""
    for key, what in (("prepare", "other data"), ("epsilon", "another threat model")):
        for run in runs[1:]:
            if run.params.get(key) != runs[0].params.get(key):
                names = f"{run.record.name} and {runs[0].record.name}"
                raise UserError(f"{names} cannot be aggregated: '{key}' of params.yaml differs, one is about {what}")


def varying(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted keys whose values are not the same everywhere."""
    leaves = [dotted(each) for each in params]
    keys = dict.fromkeys(key for each in leaves for key in each)
    return [key for key in keys if any(key not in each or each[key] != leaves[0].get(key) for each in leaves)]


def _run(record: Snapshot, claims: Mapping[str, Claim]) -> ReplicateRun:
    params = read_params(record)
    where = f"{record.name}: params.yaml"
    seed = validate(params.get("seed"), Seed, where, "seed")
    try:
        epsilon = parse_epsilon(params.get("epsilon"))  # 8/255 and its decimals are one threat model
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    _check_lock(record, params)
    _check_terms(record, claims, seed, epsilon)
    weighed = {name: weigh(record, claim, seed) for name, claim in claims.items()}
    refusals = [found for found in weighed.values() if isinstance(found, Refusal) and found.status == "not judged"]
    if refusals and len(refusals) == len(weighed):
        raise UserError(refusals[0].reason)
    rest = {key: value for key, value in params.items() if key not in NO_RESULT}
    return ReplicateRun(record, seed, rest | {"epsilon": epsilon}, weighed)


def _check_lock(record: Snapshot, params: Mapping[str, Any]) -> None:
    """Params edited after a run, as in a workspace, would file its results under what they are not of.

    dvc.lock holds the parameters that each stage last ran with. A folder without one is taken at its word.
    """
    leaves = dotted(params)
    for stage, ran in _locked(record):
        for key, value in ran.items():
            now = {leaf: leaves[leaf] for leaf in leaves if leaf == key or leaf.startswith(f"{key}.")}
            if now and now != dotted({key: value}):
                raise UserError(
                    f"{record.name}: {stage} ran with another '{key}' than params.yaml has; run `dvc repro`"
                )


def _locked(record: Snapshot) -> list[tuple[str, dict[str, Any]]]:
    content = record.read(LOCK)
    try:
        stages = parse_yaml(content.decode())["stages"] if content is not None else {}
        ran = {name: entry.get("params", {}).get("params.yaml", {}) for name, entry in stages.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{record.name}: {LOCK} cannot be read") from error
    return [(name, params) for name, params in ran.items() if name.partition("@")[0] in STAGES]


def _check_terms(record: Snapshot, claims: Mapping[str, Claim], seed: int, epsilon: float) -> None:
    """The reports say what their random numbers came from."""
    for model in {model: None for claim in claims.values() for model in (claim.model, claim.over)}:
        if record.read(evaluation_files.path(model)) is None:
            continue  # its claims will say so
        report = evaluation_files.read(record, model)
        if report.terms.seed != evaluation_seed(seed) or report.epsilon != epsilon:
            raise UserError(f"{record.name}: results on {model} are not of the seed and epsilon in params.yaml")

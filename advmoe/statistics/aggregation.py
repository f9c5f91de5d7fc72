"""Tests claims about a method over several training seeds.

The seed is the unit of replication: more test images narrow the interval of one checkpoint, but do not measure the
variance between training runs. Each seed gives one number per claim, the difference of two accuracies on the same
images, and the test is over these numbers.

For sources without an official test split, a seed also draws other splits of the same images. These overlap, so the
results hold for seeds on this data set, not for other data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from advmoe.core import console, files
from advmoe.core.snapshots import CURRENT_FOLDER, FolderSnapshot, GitSnapshot, Snapshot, flatten_keys, list_experiments
from advmoe.statistics.claims import ALPHA, claim_status, format_p_value, holm_correction
from advmoe.statistics.pairing import Claim, NoEvidence, PairedEvidence
from advmoe.statistics.replicates import (
    Excluded,
    ReplicateRun,
    check_same_setup,
    collect_runs,
    group_by_params,
    varying_keys,
)
from advmoe.statistics.seed_tests import MIN_SEEDS, SeedTest, mean_difference_test

SCHEMA = 1
DIGITS = 6


@dataclass(frozen=True)
class Replicate:
    """The evidence of one seed for a claim."""

    run: ReplicateRun
    evidence: PairedEvidence

    @property
    def difference(self) -> Fraction:
        """The exact difference of the two accuracies."""
        paired = self.evidence.paired
        return Fraction(paired.only_first - paired.only_second, self.evidence.model.total)

    def as_dict(self) -> dict[str, Any]:
        """Returns the replicate for JSON, with everything needed to recompute the claim."""
        return {**self.run.as_dict(), "difference": round(float(self.difference), DIGITS), **self.evidence.as_dict()}


@dataclass(frozen=True)
class SeedClaimResult:
    """The status of a claim over seeds. `test` and `adjusted_p` (Holm) are None if there were too few seeds."""

    name: str
    claim: Claim
    status: str
    sentence: str
    replicates: tuple[Replicate, ...]
    excluded: tuple[Excluded, ...]
    test: SeedTest | None = None
    adjusted_p: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the result for JSON."""
        return {
            "claim": self.claim.model_dump(),
            "status": self.status,
            "sentence": self.sentence,
            "p_holm": self.adjusted_p,
            "test": None if self.test is None else self.test.as_dict(),
            "seeds": [replicate.as_dict() for replicate in self.replicates],
            "left_out": [excluded.as_dict() for excluded in self.excluded],
        }


@dataclass(frozen=True)
class ReplicateGroup:
    """Runs of one method, which differ only in their seed. `differs`: the params that distinguish the group."""

    runs: tuple[ReplicateRun, ...]
    differs: Mapping[str, Any]
    results: tuple[SeedClaimResult, ...]

    @property
    def title(self) -> str:
        """The seeds and the distinguishing params."""
        params = "".join(f", {key} = {value}" for key, value in self.differs.items())
        return f"seeds {files.join_names(sorted(run.seed for run in self.runs))}{params}"

    def as_dict(self) -> dict[str, Any]:
        """Returns the group for JSON."""
        return {
            "records": [run.as_dict() for run in self.runs],
            "differs": {key: str(value) for key, value in self.differs.items()},
            "claims": {result.name: result.as_dict() for result in self.results},
        }


@dataclass(frozen=True)
class Aggregate:
    """All groups, the largest first, and the excluded snapshots. The claims of a group form one family."""

    groups: tuple[ReplicateGroup, ...]
    excluded: tuple[Excluded, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the aggregate for JSON."""
        return {
            "schema_version": SCHEMA,
            "alpha": ALPHA,
            "least_seeds": MIN_SEEDS,
            "groups": [group.as_dict() for group in self.groups],
            "left_out": [excluded.as_dict() for excluded in self.excluded],
        }


def available_snapshots(root: Path = CURRENT_FOLDER) -> list[Snapshot]:
    """Returns all DVC experiments of the repository at `root`, then its current files. Raises UserError without git."""
    return [*(GitSnapshot(name, root) for name in list_experiments(root)), FolderSnapshot(root)]


def aggregate(
    snapshots: Sequence[Snapshot], claims: Mapping[str, Claim], *, require_same_setup: bool = True
) -> Aggregate:
    """Tests claims over the seeds of each group of snapshots.

    With `require_same_setup`, snapshots with different data or threat models raise UserError; otherwise they form
    groups of their own.
    """
    runs, unusable = collect_runs(snapshots, claims)
    if require_same_setup:
        check_same_setup(runs)
    groups, duplicates = group_by_params(runs)
    keys = varying_keys([group[0].params for group in groups])
    return Aggregate(tuple(_evaluate_group(group, claims, keys) for group in groups), (*unusable, *duplicates))


def write(result: Aggregate, path: Path) -> None:
    """Writes the aggregate as JSON, atomically."""
    files.write_json(path, result.as_dict())


def show(result: Aggregate) -> None:
    """Prints the claims of every group, and warnings about excluded snapshots."""
    for group in result.groups:
        rows = [[str(claim.claim), claim.status, claim.sentence] for claim in group.results]
        console.text_table(f"claims about methods, {group.title}", ["claim", "status", "evidence"], rows)
        for claim in group.results:
            _warn_excluded(claim.excluded, f"{claim.name}: ")
    _warn_excluded(result.excluded, "")
    if not result.groups:
        console.info("no snapshot holds results for these claims")


def _evaluate_group(runs: Sequence[ReplicateRun], claims: Mapping[str, Claim], keys: Sequence[str]) -> ReplicateGroup:
    untested = {name: _collect_replicates(name, claim, runs) for name, claim in claims.items()}
    tests = {
        name: mean_difference_test([replicate.difference for replicate in result.replicates])
        for name, result in untested.items()
        if len(result.replicates) >= MIN_SEEDS
    }
    adjusted = dict(zip(tests, holm_correction([test.p for test in tests.values()]), strict=True))
    tested = {name: _with_test(untested[name], tests[name], adjusted[name]) for name in tests}
    leaves = flatten_keys(runs[0].params)
    differs = {key: leaves.get(key, "missing") for key in keys}
    return ReplicateGroup(tuple(runs), differs, tuple((untested | tested).values()))


def _collect_replicates(name: str, claim: Claim, runs: Sequence[ReplicateRun]) -> SeedClaimResult:
    """The claim before its test: "not judged", or "withheld" without replicates if a check failed at any seed."""
    evidence = [(run, run.evidence[name]) for run in runs]
    missing = [(run, each) for run, each in evidence if isinstance(each, NoEvidence)]
    excluded = tuple(Excluded(run.snapshot.name, f"{each.status}: {each.reason}") for run, each in missing)
    failed = [(run, each) for run, each in missing if each.status == "withheld"]
    if failed:  # testing the other seeds only would be a selection of seeds
        sentence = f"a check failed at seed {files.join_names(run.seed for run, _ in failed)}"
        return SeedClaimResult(name, claim, "withheld", f"{sentence}: {failed[0][1].reason}", (), excluded)
    replicates = tuple(Replicate(run, each) for run, each in evidence if isinstance(each, PairedEvidence))
    sentence = _missing_seeds_message([replicate.run.seed for replicate in replicates])
    return SeedClaimResult(name, claim, "not judged", sentence, replicates, excluded)


def _missing_seeds_message(seeds: Sequence[int]) -> str:
    missing = [seed for seed in range(MIN_SEEDS + len(seeds)) if seed not in seeds][: MIN_SEEDS - len(seeds)]
    have = f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}" + (
        f" ({files.join_names(sorted(seeds))})" if seeds else ""
    )
    more = f"`dvc exp run --queue -S 'seed={','.join(map(str, missing))}'`, `dvc queue start`, `advmoe aggregate`"
    return f"{have}, and claims about a method need at least {MIN_SEEDS}; for more: {more}"


def _with_test(result: SeedClaimResult, test: SeedTest, adjusted_p: float) -> SeedClaimResult:
    claim, replicates = result.claim, result.replicates
    model = _mean_percent([replicate.evidence.model.accuracy for replicate in replicates])
    over = _mean_percent([replicate.evidence.over.accuracy for replicate in replicates])
    notes = {replicate.evidence.note: None for replicate in replicates if replicate.evidence.note}
    sentence = (
        f"mean of {len(replicates)} seeds: {claim.model} {model}, {claim.over} {over}: {test}, "
        f"p {format_p_value(test.p)}, Holm {format_p_value(adjusted_p).removeprefix('= ')}"
        + "".join(f"; {note}" for note in notes)
    )
    status = claim_status(test.mean, adjusted_p)
    return SeedClaimResult(result.name, claim, status, sentence, replicates, result.excluded, test, adjusted_p)


def _mean_percent(accuracies: Sequence[float]) -> str:
    return f"{100 * math.fsum(accuracies) / len(accuracies):.1f} %"


def _warn_excluded(excluded: Iterable[Excluded], prefix: str) -> None:
    for entry in excluded:
        console.warn(f"{prefix}{entry.snapshot_name} is excluded: {entry.reason}")

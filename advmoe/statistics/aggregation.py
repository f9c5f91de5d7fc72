"""Claims about methods: whether training again, from other seeds, gives the same answer.

The seed is the unit of replication. The images of a test set say how well a checkpoint is known, not how much training
scatters: a thousand more images make the interval of one checkpoint narrow and leave one seed one seed. So each seed
gives one number per claim, the difference of two accuracies on the same images, and the test is over these numbers.

Where the source has no official test split, a seed draws other splits of the same images too. These overlap, so what
is found holds for seeds on this data set and not for other data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from advmoe.core import console, files
from advmoe.core.snapshots import HERE, Folder, Revision, Snapshot, dotted, experiments
from advmoe.statistics import claims as checkpoints
from advmoe.statistics.claims import format_p, holm, status
from advmoe.statistics.pairing import Claim, Evidence, Refusal
from advmoe.statistics.replicates import Excluded, ReplicateRun, check_one_question, gather, grouped, varying
from advmoe.statistics.seed_tests import LEAST, SeedTest, over_seeds

SCHEMA = 1
DIGITS = 6


@dataclass(frozen=True)
class Replicate:
    """What one seed gives a claim."""

    run: ReplicateRun
    evidence: Evidence

    @property
    def difference(self) -> Fraction:
        """Of the accuracies, exactly."""
        paired = self.evidence.paired
        return Fraction(paired.only_first - paired.only_second, self.evidence.model.total)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: enough to compute the claim again."""
        return {**self.run.as_dict(), "difference": round(float(self.difference), DIGITS), **self.evidence.as_dict()}


@dataclass(frozen=True)
class SeedClaimResult:
    """What became of a claim over the seeds; `tested` and `holm` are there when there were seeds enough."""

    name: str
    claim: Claim
    status: str
    sentence: str
    replicates: tuple[Replicate, ...]
    left: tuple[Excluded, ...]
    tested: SeedTest | None = None
    holm: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "claim": self.claim.model_dump(),
            "status": self.status,
            "sentence": self.sentence,
            "p_holm": self.holm,
            "test": None if self.tested is None else self.tested.as_dict(),
            "seeds": [replicate.as_dict() for replicate in self.replicates],
            "left_out": [left.as_dict() for left in self.left],
        }


@dataclass(frozen=True)
class Group:
    """Runs of one method: equal params.yaml but for the seed. `differs`: the dotted keys that tell it from others."""

    runs: tuple[ReplicateRun, ...]
    differs: Mapping[str, Any]
    findings: tuple[SeedClaimResult, ...]

    @property
    def title(self) -> str:
        """Seeds, and what sets this group apart."""
        apart = "".join(f", {key} = {value}" for key, value in self.differs.items())
        return f"seeds {files.names(sorted(run.seed for run in self.runs))}{apart}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "records": [run.as_dict() for run in self.runs],
            "differs": {key: str(value) for key, value in self.differs.items()},
            "claims": {finding.name: finding.as_dict() for finding in self.findings},
        }


@dataclass(frozen=True)
class Aggregate:
    """Every group of records, the largest first, and what was left out. The claims of a group are one family."""

    groups: tuple[Group, ...]
    left: tuple[Excluded, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema_version": SCHEMA,
            "alpha": checkpoints.ALPHA,
            "least_seeds": LEAST,
            "groups": [group.as_dict() for group in self.groups],
            "left_out": [left.as_dict() for left in self.left],
        }


def available(root: Path = HERE) -> list[Snapshot]:
    """Every DVC experiment of the repository around `root`, then its files as they are. UserError without git."""
    return [*(Revision(name, root) for name in experiments(root)), Folder(root)]


def aggregate(records: Sequence[Snapshot], claims: Mapping[str, Claim], *, chosen: bool = True) -> Aggregate:
    """Judge claims over the seeds of each group of records.

    `chosen`: somebody named these records, meaning them to belong together; then different data or another threat
    model is a mistake and raises UserError. Otherwise such records just make groups of their own.
    """
    runs, without = gather(records, claims)
    if chosen:
        check_one_question(runs)
    groups, twins = grouped(runs)
    apart = varying([group[0].params for group in groups])
    return Aggregate(tuple(_group(group, claims, apart) for group in groups), (*without, *twins))


def write(found: Aggregate, path: Path) -> None:
    """Write the aggregate as JSON, atomically."""
    files.write_json(path, found.as_dict())


def show(found: Aggregate) -> None:
    """Print every group's claims, and what was left out."""
    for group in found.groups:
        rows = [[str(finding.claim), finding.status, finding.sentence] for finding in group.findings]
        console.listing(f"claims about methods, {group.title}", ["claim", "", "evidence"], rows)
        for finding in group.findings:
            _warn(finding.left, f"{finding.name}: ")
    _warn(found.left, "")
    if not found.groups:
        console.say("no record holds results that claims could be judged by")


def _group(runs: Sequence[ReplicateRun], claims: Mapping[str, Claim], apart: Sequence[str]) -> Group:
    first = {name: _before_test(name, claim, runs) for name, claim in claims.items()}
    tests = {
        name: over_seeds([replicate.difference for replicate in finding.replicates])
        for name, finding in first.items()
        if len(finding.replicates) >= LEAST
    }
    adjusted = dict(zip(tests, holm([tested.p for tested in tests.values()]), strict=True))
    tested = {name: _after_test(first[name], tests[name], adjusted[name]) for name in tests}
    leaves = dotted(runs[0].params)
    differs = {key: leaves.get(key, "missing") for key in apart}
    return Group(tuple(runs), differs, tuple((first | tested).values()))


def _before_test(name: str, claim: Claim, runs: Sequence[ReplicateRun]) -> SeedClaimResult:
    """Not judged, as it stands; withheld, and without replicates, when a check failed at any seed."""
    found = [(run, run.weighed[name]) for run in runs]
    refused = [(run, each) for run, each in found if isinstance(each, Refusal)]
    left = tuple(Excluded(run.record.name, f"{refusal.status}: {refusal.reason}") for run, refusal in refused)
    failed = [(run, refusal) for run, refusal in refused if refusal.status == "withheld"]
    if failed:  # to go on without these seeds would be to choose seeds
        sentence = f"a check failed at seed {files.names(run.seed for run, _ in failed)}"
        return SeedClaimResult(name, claim, "withheld", f"{sentence}: {failed[0][1].reason}", (), left)
    replicates = tuple(Replicate(run, each) for run, each in found if isinstance(each, Evidence))
    return SeedClaimResult(
        name, claim, "not judged", _too_few([each.run.seed for each in replicates]), replicates, left
    )


def _too_few(seeds: Sequence[int]) -> str:
    missing = [seed for seed in range(LEAST + len(seeds)) if seed not in seeds][: LEAST - len(seeds)]
    have = f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}" + (f" ({files.names(sorted(seeds))})" if seeds else "")
    more = f"`dvc exp run --queue -S 'seed={','.join(map(str, missing))}'`, `dvc queue start`, `advmoe aggregate`"
    return f"{have}, and a method is judged from {LEAST} on; for more: {more}"


def _after_test(finding: SeedClaimResult, tested: SeedTest, adjusted: float) -> SeedClaimResult:
    claim, replicates = finding.claim, finding.replicates
    model = _mean([each.evidence.model.accuracy for each in replicates])
    over = _mean([each.evidence.over.accuracy for each in replicates])
    notes = {each.evidence.note: None for each in replicates if each.evidence.note}
    sentence = (
        f"mean of {len(replicates)} seeds: {claim.model} {model}, {claim.over} {over}: {tested}, "
        f"p {format_p(tested.p)}, Holm {format_p(adjusted).removeprefix('= ')}" + "".join(f"; {note}" for note in notes)
    )
    found = status(tested.mean, adjusted)
    return SeedClaimResult(finding.name, claim, found, sentence, replicates, finding.left, tested, adjusted)


def _mean(accuracies: Sequence[float]) -> str:
    return f"{100 * math.fsum(accuracies) / len(accuracies):.1f} %"


def _warn(left: Iterable[Excluded], what: str) -> None:
    for each in left:
        console.warn(f"{what}{each.record} is left out: {each.reason}")

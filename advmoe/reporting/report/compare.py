"""Two experiments side by side: what was changed, and what moved further than chance explains."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.settings import validate
from advmoe.core.snapshots import AbsentError, Snapshot, dotted, read_json, read_params
from advmoe.statistics import evaluation_files
from advmoe.statistics.decisions import CLEAN, WORST, Decisions
from advmoe.statistics.evaluation_files import NOT_ASKED, Counted, EvaluationFile, Part

if TYPE_CHECKING:  # loads torch, which a refusal need not wait for
    from advmoe.statistics.difference import Difference, Pair

PREPARED = paths.METRICS / "prepare.json"
MISSING = "-"
CHANCE = "each interval is one of 95 %: of twenty rows in which nothing moved, one is expected to say yes"
UNPAIRED = "intervals are unpaired, wider than they need be"
THREATS = ("poison", "extract")
MEMBERSHIP = paths.METRICS / "membership.json"
VERSION = "schema_version"
MOVED = "yes"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; `none` says what it means that there are no rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    none: str


@dataclass(frozen=True)
class Comparison:
    """`left` before, `right` after. `notes`: what to know before reading the tables."""

    left: str
    right: str
    params: Table
    accuracy: Table
    verdicts: Table
    threats: Table
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """All of them, in reading order."""
        return self.params, self.accuracy, self.verdicts, self.threats


@dataclass(frozen=True)
class Both:
    """One model in two records; `decisions` where both records have them."""

    left: EvaluationFile
    right: EvaluationFile
    decisions: tuple[Decisions, Decisions] | None

    @property
    def model(self) -> str:
        """The model's name."""
        return self.left.model

    @property
    def paired(self) -> bool:
        """Whether the two runs decided on the same images."""
        return self.decisions is not None and self.decisions[0].same_images(self.decisions[1])

    @property
    def kinds(self) -> list[str]:
        """Clean, the attacks that both runs made, the worst case."""
        common = [kind for kind in self.left.accuracy if kind in self.right.accuracy]
        return [CLEAN, *(kind for kind in common if kind not in {CLEAN, WORST}), WORST]


class Check(Part):
    """What one check said."""

    check: str
    status: str


class Verdict(Part):
    """What all checks said of one model."""

    verdict: str
    checks: tuple[Check, ...]


def compare(left: Snapshot, right: Snapshot) -> Comparison:
    """Set two records side by side.

    Raises UserError when their data differ, when a file is broken or of another schema, and when one has no results.
    """
    before, after = read_params(left), read_params(right)
    _check_data(left, right, before, after)
    models = _models(left, right)
    return Comparison(
        left=left.name,
        right=right.name,
        params=_params(before, after),
        accuracy=_accuracy(models),
        verdicts=_verdicts(left, right, models),
        threats=_threats(left, right),
        notes=tuple(_notes(left, right, models)),
    )


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown document. Names and values are escaped: they are data."""
    from advmoe.reporting.report.markdown import escape  # noqa: PLC0415  (loads torch)

    parts = [f"# {escape(comparison.left)} and {escape(comparison.right)}"]
    if comparison.notes:
        parts.append("\n".join(f"- {escape(note)}" for note in comparison.notes))
    for table in comparison.tables:
        lines = [table.columns, tuple("---" for _ in table.columns)]
        cells = [*lines, *(tuple(map(escape, row)) for row in table.rows)]
        body = "\n".join(f"| {' | '.join(row)} |" for row in cells) if table.rows else escape(table.none)
        parts += [f"## {escape(table.title)}", body]
    return "\n\n".join(parts) + "\n"


def _check_data(left: Snapshot, right: Snapshot, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Accuracies on other images of the same source can be compared, those on another source or task cannot."""
    names = f"{left.name} and {right.name} cannot be compared"
    sources = [(params.get("prepare") or {}).get("source") for params in (before, after)]
    if sources[0] != sources[1]:
        raise UserError(f"{names}: their images come from different sources (prepare.source of params.yaml)")
    classes = [_classes(record) for record in (left, right)]
    if classes[0] != classes[1]:
        raise UserError(f"{names}: one tells {classes[0]} classes apart, the other {classes[1]}")


def _classes(record: Snapshot) -> object:
    content = read_json(record, PREPARED)
    return content.get("classes") if isinstance(content, dict) else None


def _models(left: Snapshot, right: Snapshot) -> list[Both]:
    """The models that both records hold, judged ones first."""
    there = set(right.files(paths.EVALUATION))
    names = [name for name in left.files(paths.EVALUATION) if name in there and name.endswith(".json")]
    if not names:
        raise UserError(f"{left.name} and {right.name} have no model in common under {paths.EVALUATION}")
    found = [_both(left, right, paths.EVALUATION / name) for name in names]
    return sorted(found, key=lambda both: (not both.left.judged, both.model != "mixture", both.model))


def _both(left: Snapshot, right: Snapshot, file: Path) -> Both:
    before, after = (evaluation_files.read_file(record, file) for record in (left, right))
    try:
        decided = tuple(Decisions.read(record, before.model) for record in (left, right))
    except AbsentError:
        return Both(before, after, None)
    for record, report, decisions in zip((left, right), (before, after), decided, strict=True):
        evaluation_files.check_agreement(record, report, decisions)
    return Both(before, after, (decided[0], decided[1]))


def _params(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    old, new = dotted(before), dotted(after)
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in old or key not in new or old[key] != new[key]]
    rows = tuple((key, str(old.get(key, MISSING)), str(new.get(key, MISSING))) for key in keys)
    return Table("What was changed in params.yaml", ("key", "before", "after"), rows, "Nothing.")


def _accuracy(models: list[Both]) -> Table:
    columns = ("model", "under", "before", "after", "difference", "interval", "moved")
    rows = tuple(row for both in models for row in _moves(both))
    return Table("Accuracy in % [95 % interval], difference in points", columns, rows, "No accuracy was measured.")


def _moves(both: Both) -> Iterator[tuple[str, ...]]:
    from advmoe.statistics.intervals import Share  # noqa: PLC0415  (loads torch)

    for kind in both.kinds:
        counted: list[Counted | None] = [side.accuracy.get(kind) for side in (both.left, both.right)]
        shares = [None if each is None else Share.counted(each.correct, each.total) for each in counted]
        cells = ["withheld" if share is None else str(share) for share in shares]
        found = _difference(both, kind)
        moved = ("", "", "") if found is None else (str(found), found.how, MOVED if found.moved else "no")
        yield both.model, kind, *cells, *moved


def _difference(both: Both, kind: str) -> "Difference | None":
    """None where a failed check withholds one of the accuracies, or no image met the attack in both runs."""
    from advmoe.statistics import difference  # noqa: PLC0415  (loads torch)
    from advmoe.statistics.intervals import Share  # noqa: PLC0415  (loads torch)

    before, after = both.left.accuracy.get(kind), both.right.accuracy.get(kind)
    if before is None or after is None:
        return None
    if not both.paired:
        shares = (Share.counted(each.correct, each.total) for each in (before, after))
        return difference.on_other_images(*shares)
    pairs = _pairs(both, kind)
    return difference.on_same_images(pairs) if pairs else None


def _pairs(both: Both, kind: str) -> "list[Pair]":
    assert both.decisions is not None
    left, right = (decisions.correct[kind] for decisions in both.decisions)
    cells = zip(left, right, strict=True)
    return [(before, after) for before, after in cells if before is not None and after is not None]


def _verdicts(left: Snapshot, right: Snapshot, models: list[Both]) -> Table:
    before, after = _statuses(left), _statuses(right)
    rows = []
    for model in (both.model for both in models):
        keys = dict.fromkeys(key for key in [*before, *after] if key[0] == model)
        pairs = [(key, before.get(key, NOT_ASKED), after.get(key, NOT_ASKED)) for key in keys]
        rows += [(*key, old, new) for key, old, new in pairs if old != new]
    columns = ("model", "check", "before", "after")
    return Table("What the checks say", columns, tuple(rows), "The same of every model that both have.")


def _statuses(record: Snapshot) -> dict[tuple[str, str], str]:
    """By model and check; a model's verdict stands under `verdict`."""
    content = read_json(record, paths.VERDICT)
    verdicts = validate(content, dict[str, Verdict], f"{record.name}: {paths.VERDICT}")
    found: dict[tuple[str, str], str] = {}
    for model, each in verdicts.items():
        found[model, "verdict"] = each.verdict
        found |= {(model, check.check): check.status for check in each.checks}
    return found


def _threats(left: Snapshot, right: Snapshot) -> Table:
    """The numbers of poisoning, extraction and membership that both have and that differ; they carry no intervals."""
    rows: list[tuple[str, ...]] = []
    total = 0
    for file in _threat_files(left, right):
        before, after = _numbers(left, file), _numbers(right, file)
        common = [key for key in before if key in after]
        total += len(common)
        for key in common:
            if before[key] != after[key]:
                change = f"{after[key] - before[key]:+.4g}"
                rows.append((str(file), key, f"{before[key]:g}", f"{after[key]:g}", change))
    title = f"Poisoning, extraction, membership: {len(rows)} of {total} numbers differ"
    none = "Nothing to set side by side." if not total else "All numbers are the same."
    return Table(title, ("file", "number", "before", "after", "change"), tuple(rows), none)


def _threat_files(left: Snapshot, right: Snapshot) -> Iterator[Path]:
    for folder in (paths.METRICS / threat for threat in THREATS):
        there = set(right.files(folder))
        yield from (folder / name for name in left.files(folder) if name in there and name.endswith(".json"))
    if MEMBERSHIP.name in {*left.files(paths.METRICS)} & {*right.files(paths.METRICS)}:
        yield MEMBERSHIP


def _numbers(record: Snapshot, file: Path) -> dict[str, float]:
    content = read_json(record, file)
    if not isinstance(content, dict) or content.get(VERSION) != 1:
        raise UserError(f"{record.name}: {file} is of another schema than this version of advmoe reads")
    leaves = {key: value for key, value in dotted(content).items() if key != VERSION}
    return {key: value for key, value in leaves.items() if type(value) in {int, float}}


def _notes(left: Snapshot, right: Snapshot, models: list[Both]) -> Iterator[str]:
    yield CHANCE
    if any(both.left.epsilon != both.right.epsilon for both in models):
        yield "the threat models differ (epsilon): accuracies under attack answer different questions"
    said: dict[str, list[str]] = {}
    for both in models:
        for remark in _remarks(both):
            said.setdefault(remark, []).append(both.model)
    yield from (f"{remark}: {', '.join(names)}" for remark, names in said.items())
    alone = set(left.files(paths.EVALUATION)) ^ set(right.files(paths.EVALUATION))
    if alone:
        yield f"only one of the two has {', '.join(sorted(alone))}"


def _remarks(both: Both) -> Iterator[str]:
    """What holds for several models is said once."""
    if both.decisions is None:
        yield f"{UNPAIRED}, because not both have the decisions image by image"
    elif not both.paired:
        yield f"{UNPAIRED}, because the test images are not the same"
    before, after = both.left.attacks, both.right.attacks
    alone = [name for name in {**before, **after} if (name in before) != (name in after)]
    if alone:
        yield f"only one run made {', '.join(alone)}, so the worst case is one of other attacks"
    changed = [name for name in before if name in after and before[name] != after[name]]
    if changed:
        yield f"{', '.join(changed)} had other settings"

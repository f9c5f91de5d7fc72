"""Compares two runs: changed parameters, differences of accuracies with 95 % intervals, changed checks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.core.settings import validate
from advmoe.core.snapshots import MissingFileError, Snapshot, flatten_keys, read_json, read_params
from advmoe.statistics import evaluation_files
from advmoe.statistics.decisions import CLEAN, WORST, Decisions
from advmoe.statistics.evaluation_files import NOT_CHECKED, Counts, EvaluationFile, FileSection

if TYPE_CHECKING:  # imports torch, which error messages should not wait for
    from advmoe.statistics.difference import Difference, Pair

DATASET_METRICS = paths.METRICS / "prepare.json"
MISSING = "-"
CHANCE_NOTE = "95 % intervals, not corrected for multiple comparisons: one in twenty unchanged rows may be significant"
UNPAIRED_NOTE = "intervals are unpaired and wider than paired ones"
THREATS = ("poison", "extract")
MEMBERSHIP = paths.METRICS / "membership.json"
SCHEMA_KEY = "schema_version"
SIGNIFICANT = "yes"


@dataclass(frozen=True)
class ComparisonTable:
    """A table of text; `empty_text` replaces it if there are no rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    empty_text: str


@dataclass(frozen=True)
class Comparison:
    """The comparison of `left` (before) and `right` (after). `notes` qualify the tables."""

    left: str
    right: str
    params: ComparisonTable
    accuracy: ComparisonTable
    verdicts: ComparisonTable
    threats: ComparisonTable
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[ComparisonTable, ...]:
        """All tables, in order."""
        return self.params, self.accuracy, self.verdicts, self.threats


@dataclass(frozen=True)
class ModelPair:
    """One model in two snapshots; `decisions` is None unless both snapshots have them."""

    left: EvaluationFile
    right: EvaluationFile
    decisions: tuple[Decisions, Decisions] | None

    @property
    def model(self) -> str:
        """The model's name."""
        return self.left.model

    @property
    def paired(self) -> bool:
        """Whether both runs evaluated the same images."""
        return self.decisions is not None and self.decisions[0].same_images(self.decisions[1])

    @property
    def kinds(self) -> list[str]:
        """Clean, the attacks of both runs, worst case."""
        common = [kind for kind in self.left.accuracy if kind in self.right.accuracy]
        return [CLEAN, *(kind for kind in common if kind not in {CLEAN, WORST}), WORST]


class CheckEntry(FileSection):
    """The status of one check."""

    check: str
    status: str


class VerdictEntry(FileSection):
    """The verdict and the checks of one model."""

    verdict: str
    checks: tuple[CheckEntry, ...]


def compare_snapshots(left: Snapshot, right: Snapshot) -> Comparison:
    """Compares two snapshots.

    Raises UserError when their data sets differ, a file is malformed or of another schema, or results are missing.
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


def to_markdown(comparison: Comparison) -> str:
    """Renders the comparison as Markdown. Names and values are escaped."""
    from advmoe.reporting.report.markdown import escape  # noqa: PLC0415  (imports torch)

    parts = [f"# {escape(comparison.left)} and {escape(comparison.right)}"]
    if comparison.notes:
        parts.append("\n".join(f"- {escape(note)}" for note in comparison.notes))
    for table in comparison.tables:
        lines = [table.columns, tuple("---" for _ in table.columns)]
        cells = [*lines, *(tuple(map(escape, row)) for row in table.rows)]
        body = "\n".join(f"| {' | '.join(row)} |" for row in cells) if table.rows else escape(table.empty_text)
        parts += [f"## {escape(table.title)}", body]
    return "\n\n".join(parts) + "\n"


def _check_data(left: Snapshot, right: Snapshot, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises UserError unless both snapshots have the same data source and number of classes."""
    names = f"{left.name} and {right.name} cannot be compared"
    sources = [(params.get("prepare") or {}).get("source") for params in (before, after)]
    if sources[0] != sources[1]:
        raise UserError(f"{names}: their images come from different sources (prepare.source of params.yaml)")
    classes = [_classes(snapshot) for snapshot in (left, right)]
    if classes[0] != classes[1]:
        raise UserError(f"{names}: one has {classes[0]} classes, the other {classes[1]}")


def _classes(snapshot: Snapshot) -> object:
    content = read_json(snapshot, DATASET_METRICS)
    return content.get("classes") if isinstance(content, dict) else None


def _models(left: Snapshot, right: Snapshot) -> list[ModelPair]:
    """Returns the models of both snapshots, checked ones first."""
    others = set(right.files(paths.EVALUATION))
    names = [name for name in left.files(paths.EVALUATION) if name in others and name.endswith(".json")]
    if not names:
        raise UserError(f"{left.name} and {right.name} have no model in common under {paths.EVALUATION}")
    pairs = [_model_pair(left, right, paths.EVALUATION / name) for name in names]
    return sorted(pairs, key=lambda both: (not both.left.checked, both.model != "mixture", both.model))


def _model_pair(left: Snapshot, right: Snapshot, file: Path) -> ModelPair:
    before, after = (evaluation_files.read_file(snapshot, file) for snapshot in (left, right))
    try:
        read = tuple(Decisions.read(snapshot, before.model) for snapshot in (left, right))
    except MissingFileError:
        return ModelPair(before, after, None)
    for snapshot, report, decisions in zip((left, right), (before, after), read, strict=True):
        evaluation_files.check_agreement(snapshot, report, decisions)
    return ModelPair(before, after, (read[0], read[1]))


def _params(before: Mapping[str, Any], after: Mapping[str, Any]) -> ComparisonTable:
    old, new = flatten_keys(before), flatten_keys(after)
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in old or key not in new or old[key] != new[key]]
    rows = tuple((key, str(old.get(key, MISSING)), str(new.get(key, MISSING))) for key in keys)
    return ComparisonTable("Changes of params.yaml", ("key", "before", "after"), rows, "No changes.")


def _accuracy(models: list[ModelPair]) -> ComparisonTable:
    columns = ("model", "under", "before", "after", "difference", "interval", "significant")
    rows = tuple(row for both in models for row in _accuracy_rows(both))
    return ComparisonTable("Accuracy in % [95 % interval], difference in points", columns, rows, "No accuracies.")


def _accuracy_rows(both: ModelPair) -> Iterator[tuple[str, ...]]:
    from advmoe.statistics.intervals import Proportion  # noqa: PLC0415  (imports torch)

    for kind in both.kinds:
        counted: list[Counts | None] = [side.accuracy.get(kind) for side in (both.left, both.right)]
        proportions = [None if each is None else Proportion.from_counts(each.correct, each.total) for each in counted]
        cells = ["withheld" if each is None else str(each) for each in proportions]
        change = _difference(both, kind)
        shown = (
            ("", "", "")
            if change is None
            else (str(change), change.method, SIGNIFICANT if change.significant else "no")
        )
        yield both.model, kind, *cells, *shown


def _difference(both: ModelPair, kind: str) -> "Difference | None":
    """Returns None if an accuracy is withheld, or no image was attacked in both runs."""
    from advmoe.statistics import difference  # noqa: PLC0415  (imports torch)
    from advmoe.statistics.intervals import Proportion  # noqa: PLC0415  (imports torch)

    before, after = both.left.accuracy.get(kind), both.right.accuracy.get(kind)
    if before is None or after is None:
        return None
    if not both.paired:
        proportions = (Proportion.from_counts(each.correct, each.total) for each in (before, after))
        return difference.unpaired_difference(*proportions)
    pairs = _pairs(both, kind)
    return difference.paired_difference(pairs) if pairs else None


def _pairs(both: ModelPair, kind: str) -> "list[Pair]":
    assert both.decisions is not None
    left, right = (decisions.correct[kind] for decisions in both.decisions)
    cells = zip(left, right, strict=True)
    return [(before, after) for before, after in cells if before is not None and after is not None]


def _verdicts(left: Snapshot, right: Snapshot, models: list[ModelPair]) -> ComparisonTable:
    before, after = _statuses(left), _statuses(right)
    rows = []
    for model in (both.model for both in models):
        keys = dict.fromkeys(key for key in [*before, *after] if key[0] == model)
        pairs = [(key, before.get(key, NOT_CHECKED), after.get(key, NOT_CHECKED)) for key in keys]
        rows += [(*key, old, new) for key, old, new in pairs if old != new]
    columns = ("model", "check", "before", "after")
    return ComparisonTable("Changes of the checks", columns, tuple(rows), "No changes.")


def _statuses(snapshot: Snapshot) -> dict[tuple[str, str], str]:
    """Returns statuses by model and check; the check `verdict` holds the verdict of the model."""
    content = read_json(snapshot, paths.VERDICT)
    verdicts = validate(content, dict[str, VerdictEntry], f"{snapshot.name}: {paths.VERDICT}")
    statuses: dict[tuple[str, str], str] = {}
    for model, each in verdicts.items():
        statuses[model, "verdict"] = each.verdict
        statuses |= {(model, check.check): check.status for check in each.checks}
    return statuses


def _threats(left: Snapshot, right: Snapshot) -> ComparisonTable:
    """Returns the differing numbers of poisoning, extraction and membership, without intervals."""
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
    empty_text = "No results in common." if not total else "No changes."
    return ComparisonTable(title, ("file", "number", "before", "after", "change"), tuple(rows), empty_text)


def _threat_files(left: Snapshot, right: Snapshot) -> Iterator[Path]:
    for folder in (paths.METRICS / threat for threat in THREATS):
        others = set(right.files(folder))
        yield from (folder / name for name in left.files(folder) if name in others and name.endswith(".json"))
    if MEMBERSHIP.name in {*left.files(paths.METRICS)} & {*right.files(paths.METRICS)}:
        yield MEMBERSHIP


def _numbers(snapshot: Snapshot, file: Path) -> dict[str, float]:
    content = read_json(snapshot, file)
    if not isinstance(content, dict) or content.get(SCHEMA_KEY) != 1:
        raise UserError(f"{snapshot.name}: {file} has another schema than this version of advmoe reads")
    leaves = {key: value for key, value in flatten_keys(content).items() if key != SCHEMA_KEY}
    return {key: value for key, value in leaves.items() if type(value) in {int, float}}


def _notes(left: Snapshot, right: Snapshot, models: list[ModelPair]) -> Iterator[str]:
    yield CHANCE_NOTE
    if any(both.left.epsilon != both.right.epsilon for both in models):
        yield "the threat models differ (epsilon): accuracies under attack are not comparable"
    notes: dict[str, list[str]] = {}
    for both in models:
        for note in _model_notes(both):
            notes.setdefault(note, []).append(both.model)
    yield from (f"{note}: {', '.join(names)}" for note, names in notes.items())
    unmatched = set(left.files(paths.EVALUATION)) ^ set(right.files(paths.EVALUATION))
    if unmatched:
        yield f"only in one of the two: {', '.join(sorted(unmatched))}"


def _model_notes(both: ModelPair) -> Iterator[str]:
    """Yields notes on one model; equal notes of several models are merged."""
    if both.decisions is None:
        yield f"{UNPAIRED_NOTE}: the decisions of one run are missing"
    elif not both.paired:
        yield f"{UNPAIRED_NOTE}: the test images differ"
    before, after = both.left.attacks, both.right.attacks
    unmatched = [name for name in {**before, **after} if (name in before) != (name in after)]
    if unmatched:
        yield f"only one run used {', '.join(unmatched)}: the worst cases are over different attacks"
    changed = [name for name in before if name in after and before[name] != after[name]]
    if changed:
        yield f"settings differ for {', '.join(changed)}"

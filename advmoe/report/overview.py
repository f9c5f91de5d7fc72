"""The first screen: the verdict, the headline, the findings, and the mixture beside its comparators."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.evaluation.harness import CLEAN, WORST
from advmoe.evaluation.results import BASELINE, MIXTURE
from advmoe.report.document import Block, Cell, Paragraph, Row, Section, Table, missing, row, table
from advmoe.report.figures import Dot, colours, dots
from advmoe.report.formats import ABSENT, difference, interval, is_mixture, model_name, p_value, percent, radius
from advmoe.report.reading import Sources

NOT_JUDGED = "not judged"  # a claim that this record cannot answer
NOT_ASKED = "not asked"  # the verdict of a model that no check looked at
VERDICTS = {
    "pass": "All checks passed: these numbers may be believed, as upper bounds.",
    "warn": "No check failed, but one at least warns: read it below before you believe the numbers.",
    "fail": "A check failed, so the robust accuracy is withheld.",
}
NO_FINDINGS = "No claims were judged in this record: metrics/findings.json is absent."
NO_AGGREGATE = "About methods, rather than these networks, nothing is claimed here: that takes at least three seeds."


@dataclass(frozen=True)
class Finding:
    """A claim, what became of it, and the evidence in a sentence. `basis`: this run, or the seeds it rests on."""

    claim: str
    status: str
    sentence: str
    basis: str

    @property
    def cell(self) -> Cell:
        """Its status, coloured."""
        return Cell(self.status, status=self.status)


@dataclass(frozen=True)
class Head:
    """What the first screen says. `number` is empty where the headline is withheld or nothing was evaluated."""

    verdict: str
    meaning: str
    number: str
    interval: str
    caption: str
    reasons: tuple[str, ...]
    clean: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def evidence(self) -> Table:
        """What each finding rests on."""
        rows = [row([each.claim, each.cell, each.sentence, each.basis]) for each in self.findings]
        return table("Findings with their evidence", ["claim", "finding", "evidence", "rests on"], rows)


def head(sources: Sources) -> Head:
    """The first screen of a record."""
    found, notes = _findings(sources)
    mixture = sources.models.get(MIXTURE)
    if mixture is None:
        what = "Nothing was evaluated in this record; `dvc repro evaluate` does."
        return Head("not evaluated", what, "", "", "", (), "", found, notes)
    worst, clean = mixture["accuracy"][WORST], mixture["accuracy"][CLEAN]
    attacks = len(mixture["attacks"])
    caption = (
        f"of {clean['total']} test images the mixture gets right in the worst case over {attacks} attacks, "
        f"L-inf epsilon {radius(mixture['epsilon'])}"
    )
    return Head(
        verdict=mixture["verdict"],
        meaning=VERDICTS[mixture["verdict"]],
        number="" if worst is None else percent(worst["accuracy"]),
        interval="" if worst is None else f"{percent(worst['low'])} to {percent(worst['high'])}",
        caption=caption,
        reasons=tuple(mixture["withheld"]),
        clean=interval(clean),
        findings=found,
        notes=notes,
    )


def _findings(sources: Sources) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    found: list[Finding] = []
    notes = []
    if sources.findings is None:
        notes.append(NO_FINDINGS)
    else:
        found += [_finding(claim, "this run") for claim in sources.findings["claims"].values()]
    if sources.aggregate is None:
        notes.append(NO_AGGREGATE)
    else:
        groups = sources.aggregate.get("groups", [sources.aggregate])
        found += [_finding(claim, _seeds(claim)) for group in groups for claim in group["claims"].values()]
    return tuple(sorted(found, key=lambda each: each.status == NOT_JUDGED)), tuple(notes)


def _finding(claim: Mapping[str, Any], basis: str) -> Finding:
    about = claim.get("claim", claim)
    over = (model_name(about["model"]), model_name(about["over"]))
    under = {WORST: "in the worst case", CLEAN: "on clean images"}.get(about["under"], f"under {about['under']}")
    return Finding(f"{over[0]} better than {over[1]} {under}", claim["status"], claim["sentence"], basis)


def _seeds(claim: Mapping[str, Any]) -> str:
    seeds = [each["seed"] if isinstance(each, Mapping) else each for each in claim.get("seeds", [])]
    return f"seeds {', '.join(map(str, seeds))}" if seeds else "several seeds"


def section(sources: Sources) -> Section:
    """The mixture beside its comparators."""
    title = "The mixture beside its comparators"
    if not sources.judged:
        blocks = missing("The evaluation", "`dvc repro evaluate` makes it")
        return Section("comparators", title, blocks, brief=True)
    found: list[Block] = [_figure(sources), _table(sources)]
    weaker = [name for name, each in sources.models.items() if each["verdict"] == NOT_ASKED]
    if weaker:
        found.append(Paragraph(_rest(sources)))
    return Section("comparators", title, tuple(found), brief=True)


def _rest(sources: Sources) -> str:
    best = sources.summary.get("best-expert")
    expert = f" The strongest pre-trained expert by that measure is {best['name']}." if best else ""
    return (
        "Models without a verdict met fewer attacks; they are compared with the mixture over those that both met, "
        "so their worst case is no rival of the others'." + expert
    )


def _figure(sources: Sources) -> Block:
    judged = sources.judged
    series = colours((name.removeprefix(BASELINE) for name in judged), sources.networks)
    shown = list(sources.printable)
    if not shown:
        return Paragraph("Every judged model's robust accuracy is withheld, so there is nothing to draw.")
    rows = [_dot(name, judged[name]["accuracy"], series[name.removeprefix(BASELINE)]) for name in shown]
    left_out = [model_name(name) for name in judged if name not in shown]
    note = f" Withheld: {', '.join(left_out)}." if left_out else ""
    return dots(
        "comparators",
        "Worst case over all attacks",
        f"Accuracy in per cent of each judged model in its worst case, with 95 % Wilson intervals.{note}",
        rows,
        axis="accuracy, %",
        meaning={"filled": "worst case over all attacks, 95 % interval", "hollow": "clean"},
        limits=(0, 101),
    )


def _dot(name: str, accuracy: Mapping[str, Any], series: int) -> Dot:
    worst, clean = accuracy[WORST], accuracy[CLEAN]
    value, low, high = (round(100 * worst[key], 1) for key in ("accuracy", "low", "high"))
    return Dot(model_name(name), value, low, high, 100 * clean["accuracy"], series)


def _table(sources: Sources) -> Block:
    models = [name for name in sources.models if not name.startswith(("expert/", "joint-expert/"))]
    common = [kind for kind in sources.models[MIXTURE]["accuracy"] if kind != WORST and _met(sources, models, kind)]
    columns = ["model", *common, "worst case", "mixture minus it, points", "p (McNemar)", "verdict"]
    return table(
        "Accuracy in % with 95 % Wilson intervals; differences with paired bootstrap intervals",
        columns,
        [_row(sources, name, common) for name in models],
    )


def _met(sources: Sources, models: Sequence[str], kind: str) -> bool:
    return all(kind in sources.models[name]["accuracy"] for name in models)


def _row(sources: Sources, name: str, common: Sequence[str]) -> Row:
    model = sources.models[name]
    paired = sources.models[MIXTURE].get("against", {}).get(name)
    asked = model["verdict"] != NOT_ASKED
    return row(
        [
            model_name(name),
            *(interval(model["accuracy"][kind]) for kind in common),
            interval(model["accuracy"][WORST]) if asked else ABSENT,
            *_against(sources, name, paired),
            Cell(model["verdict"], status=model["verdict"]) if asked else ABSENT,
        ],
        emphasis=is_mixture(name),
    )


def _against(sources: Sources, name: str, paired: Mapping[str, Any] | None) -> tuple[str, str]:
    if paired is None:
        return ABSENT, ABSENT
    withheld = any(sources.models[each]["accuracy"][WORST] is None for each in (MIXTURE, name))
    # a difference would give away what a failed check forbids to print
    return ("withheld", ABSENT) if withheld else (difference(paired), p_value(paired["p"]))

"""The first screen: the verdict, the headline, the findings, and the mixture beside its comparators."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.evaluation.summary import BASELINE, MIXTURE, is_expert
from advmoe.reporting.report import glossary
from advmoe.reporting.report.document import Block, Cell, Paragraph, Row, Section, Table, missing, row, table
from advmoe.reporting.report.figures import Dot, colours, dots
from advmoe.reporting.report.formats import (
    ABSENT,
    difference,
    interval,
    is_mixture,
    model_name,
    p_value,
    percent,
    radius,
)
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.decisions import CLEAN, WORST

NOT_JUDGED = "not judged"  # a claim that this record cannot answer
NOT_ASKED = "not asked"  # the verdict of a model that no check looked at
VERDICTS = {
    "pass": "The checks found no sign that the attacks were too weak or the numbers wrong.",
    "warn": "No check failed, but one at least warns: read it below before you believe the number.",
    "fail": "A check failed, so the robust accuracy is withheld.",
}
ONLY_IF = "Worst case: an image counts as right only if it is right clean and after every attack that it met."
BOUND = "An accuracy under attack is an upper bound: a stronger attack may lower it."
STATUSES = (
    "Supported: ahead by more than chance explains; contradicted: behind by more than that; not supported: neither. "
    "Decided image by image (exact McNemar test, all claims together kept at 5 % by Holm's correction)."
)
HOW = (
    "difference in points with its paired bootstrap interval; images that only the first gets right against those that "
    "only the second does; p of the exact McNemar test, alone and after Holm's correction"
)
NO_FINDINGS = "No claims were judged in this record: metrics/findings.json is absent."
NO_AGGREGATE = "About methods, rather than these networks, nothing is claimed here: that takes at least three seeds."


@dataclass(frozen=True)
class ClaimSummary:
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
    """What the first screen says. `number` is empty where the headline is withheld or nothing was evaluated.

    `interval`: its ends; `notes`: on what the findings rest.
    """

    verdict: str
    meaning: str
    number: str
    interval: str
    caption: str
    reasons: tuple[str, ...]
    clean: str
    findings: tuple[ClaimSummary, ...]
    notes: tuple[str, ...]

    @property
    def evidence(self) -> Table:
        """What each finding rests on."""
        rows = [row([each.claim, each.cell, each.sentence, each.basis]) for each in self.findings]
        return table(f"Findings with their evidence: {HOW}", ["claim", "finding", "evidence", "rests on"], rows)


def head(sources: Sources) -> Head:
    """The first screen of a record."""
    found, notes = _findings(sources)
    mixture = sources.models.get(MIXTURE)
    if mixture is None:
        what = "Nothing was evaluated in this record; `dvc repro evaluate` does."
        return Head("not evaluated", what, "", "", "", (), "", found, notes)
    worst, clean = mixture["accuracy"][WORST], mixture["accuracy"][CLEAN]
    caption = (
        f"of {clean['total']} test images the mixture gets right in the worst case over {_attacks(mixture)}, "
        f"L-inf epsilon {radius(mixture['epsilon'])}"
    )
    return Head(
        verdict=mixture["verdict"],
        meaning=f"{VERDICTS[mixture['verdict']]} {ONLY_IF} {BOUND}",
        number="" if worst is None else percent(worst["accuracy"]),
        interval="" if worst is None else f"{percent(worst['low'])} to {percent(worst['high'])}",
        caption=caption,
        reasons=tuple(mixture["withheld"]),
        clean=interval(clean).replace(" ", " % ", 1),
        findings=found,
        notes=notes,
    )


def limited(model: Mapping[str, Any]) -> str:
    """The attacks that met fewer images than the test has, with how many; empty where there are none."""
    total = model["accuracy"][CLEAN]["total"]
    few = {name: each["images"] for name, each in model["attacks"].items() if each["images"] < total}
    return ", ".join(f"{name} {images}" for name, images in few.items())


def _attacks(mixture: Mapping[str, Any]) -> str:
    few = limited(mixture)
    return f"{len(mixture['attacks'])} attacks" + (f" (on fewer images: {few})" if few else "")


def _findings(sources: Sources) -> tuple[tuple[ClaimSummary, ...], tuple[str, ...]]:
    found: list[ClaimSummary] = []
    notes = []
    if sources.findings is None:
        notes.append(NO_FINDINGS)
    else:
        found += [_finding(claim, "this run") for claim in sources.findings["claims"].values()]
        notes.append(STATUSES)
    if sources.aggregate is None:
        notes.append(NO_AGGREGATE)
    else:
        groups = sources.aggregate.get("groups", [sources.aggregate])
        found += [_finding(claim, _seeds(claim)) for group in groups for claim in group["claims"].values()]
    return tuple(sorted(found, key=lambda each: each.status == NOT_JUDGED)), tuple(notes)


def _finding(claim: Mapping[str, Any], basis: str) -> ClaimSummary:
    about = claim.get("claim", claim)
    over = (model_name(about["model"]), model_name(about["over"]))
    under = {WORST: "in the worst case", CLEAN: "on clean images"}.get(about["under"], f"under {about['under']}")
    return ClaimSummary(f"{over[0]} better than {over[1]} {under}", claim["status"], claim["sentence"], basis)


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
    weaker = [name for name in _compared(sources) if sources.models[name]["verdict"] == NOT_ASKED]
    if weaker:
        found.append(Paragraph(_rest(sources, weaker)))
    found.append(_legend(sources))
    return Section("comparators", title, tuple(found), brief=True)


def _compared(sources: Sources) -> list[str]:
    """All models but single experts."""
    return [name for name in sources.models if not is_expert(name)]


def _rest(sources: Sources, weaker: Sequence[str]) -> str:
    best = sources.summary.get("best-expert")
    expert = f" The strongest pre-trained expert under those attacks is {best['name']}." if best else ""
    names = "; ".join(map(model_name, weaker))
    return (
        f"Without a verdict: {names}. They met fewer attacks, so no worst case is printed, and the mixture is compared "
        f"with them over the attacks that both met.{expert}"
    )


def _legend(sources: Sources) -> Table:
    known = ((name, glossary.network(name, sources.params)) for name in _compared(sources))
    return table(
        "What the names mean",
        ["model", "what it is"],
        [row([model_name(name), what or ABSENT], emphasis=is_mixture(name)) for name, what in known],
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
        meaning={"filled": "worst case over all attacks, 95 % interval", "hollow": "clean images"},
        limits=(0, 101),
    )


def _dot(name: str, accuracy: Mapping[str, Any], series: int) -> Dot:
    worst, clean = accuracy[WORST], accuracy[CLEAN]
    value, low, high = (round(100 * worst[key], 1) for key in ("accuracy", "low", "high"))
    return Dot(model_name(name), value, low, high, 100 * clean["accuracy"], series)


def _table(sources: Sources) -> Block:
    models = _compared(sources)
    common = [kind for kind in sources.models[MIXTURE]["accuracy"] if kind != WORST and _met(sources, models, kind)]
    columns = ["model", *common, "worst case", "worst case, mixture minus it", "p", "verdict"]
    return table(
        "Accuracy in % with 95 % Wilson intervals over the test images, one trained network each; differences in "
        "points with paired bootstrap intervals; p: exact McNemar test, not corrected for the number of rows",
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

"""The headline of the report, the claims, and the table of the mixture and its baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.evaluation.summary import BASELINE, MIXTURE, is_expert
from advmoe.reporting.report import glossary
from advmoe.reporting.report.document import Block, Cell, Paragraph, Row, Section, Table, missing_results, row, table
from advmoe.reporting.report.figures import IntervalPoint, assign_colours, interval_plot
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

NOT_JUDGED = "not judged"  # a claim without evidence
NOT_CHECKED = "not asked"  # the stored verdict of a model on which no checks were run
VERDICTS = {
    "pass": "The checks found no sign of weak attacks or wrong numbers.",
    "warn": "No check failed, but at least one has a warning; see section Checks.",
    "fail": "A check failed, so the robust accuracy is withheld.",
}
WORST_CASE_NOTE = "Worst case: an image counts as correct only if it is correct clean and under every attack run on it."
UPPER_BOUND_NOTE = "An accuracy under attack is an upper bound: a stronger attack may lower it."
STATUS_NOTE = (
    "Supported: significantly higher accuracy; contradicted: significantly lower; not supported: no significant "
    "difference. Exact McNemar test on the same images, family-wise error rate 5 % by Holm's correction."
)
EVIDENCE_NOTE = (
    "difference in points with its paired bootstrap interval; numbers of images that only the first and only the "
    "second model classifies correctly; p of the exact McNemar test, and after Holm's correction"
)
NO_CLAIM_RESULTS = "No results of claims: metrics/findings.json is missing."
NO_AGGREGATE = "No claims about methods: they need at least three seeds (`advmoe aggregate`)."


@dataclass(frozen=True)
class ClaimSummary:
    """A claim with its status and evidence. `basis`: this run, or the seeds it was tested on."""

    claim: str
    status: str
    sentence: str
    basis: str

    @property
    def cell(self) -> Cell:
        """The status as a coloured cell."""
        return Cell(self.status, status=self.status)


@dataclass(frozen=True)
class Headline:
    """The headline of the report.

    `number`: robust accuracy in %, empty if it is withheld or nothing was evaluated; `interval`: its 95 % interval;
    `reasons`: why it is withheld; `notes`: on the claims.
    """

    verdict: str
    meaning: str
    number: str
    interval: str
    caption: str
    reasons: tuple[str, ...]
    clean: str
    claims: tuple[ClaimSummary, ...]
    notes: tuple[str, ...]

    @property
    def claims_table(self) -> Table:
        """The claims with their evidence."""
        rows = [row([each.claim, each.cell, each.sentence, each.basis]) for each in self.claims]
        return table(f"Claims with their evidence: {EVIDENCE_NOTE}", ["claim", "status", "evidence", "data"], rows)


def headline(sources: Sources) -> Headline:
    """Returns the headline of a snapshot."""
    claims, notes = _claim_summaries(sources)
    mixture = sources.models.get(MIXTURE)
    if mixture is None:
        what = "No results of an evaluation; `dvc repro evaluate` runs it."
        return Headline("not evaluated", what, "", "", "", (), "", claims, notes)
    worst, clean = mixture["accuracy"][WORST], mixture["accuracy"][CLEAN]
    caption = (
        f"of {clean['total']} test images are classified correctly by the mixture in the worst case over "
        f"{_attacks(mixture)}, L-inf epsilon {radius(mixture['epsilon'])}"
    )
    return Headline(
        verdict=mixture["verdict"],
        meaning=f"{VERDICTS[mixture['verdict']]} {WORST_CASE_NOTE} {UPPER_BOUND_NOTE}",
        number="" if worst is None else percent(worst["accuracy"]),
        interval="" if worst is None else f"{percent(worst['low'])} to {percent(worst['high'])}",
        caption=caption,
        reasons=tuple(mixture["withheld"]),
        clean=interval(clean).replace(" ", " % ", 1),
        claims=claims,
        notes=notes,
    )


def attacks_on_fewer_images(model: Mapping[str, Any]) -> str:
    """Returns attacks that were run on fewer images than the test split has, with their number of images."""
    total = model["accuracy"][CLEAN]["total"]
    fewer = {name: each["images"] for name, each in model["attacks"].items() if each["images"] < total}
    return ", ".join(f"{name} {images}" for name, images in fewer.items())


def _attacks(mixture: Mapping[str, Any]) -> str:
    fewer = attacks_on_fewer_images(mixture)
    return f"{len(mixture['attacks'])} attacks" + (f" (on fewer images: {fewer})" if fewer else "")


def _claim_summaries(sources: Sources) -> tuple[tuple[ClaimSummary, ...], tuple[str, ...]]:
    claims: list[ClaimSummary] = []
    notes = []
    if sources.claims is None:
        notes.append(NO_CLAIM_RESULTS)
    else:
        claims += [_claim_summary(claim, "this run") for claim in sources.claims["claims"].values()]
        notes.append(STATUS_NOTE)
    if sources.aggregate is None:
        notes.append(NO_AGGREGATE)
    else:
        groups = sources.aggregate.get("groups", [sources.aggregate])
        claims += [_claim_summary(claim, _seeds(claim)) for group in groups for claim in group["claims"].values()]
    return tuple(sorted(claims, key=lambda each: each.status == NOT_JUDGED)), tuple(notes)


def _claim_summary(claim: Mapping[str, Any], basis: str) -> ClaimSummary:
    about = claim.get("claim", claim)
    over = (model_name(about["model"]), model_name(about["over"]))
    under = {WORST: "in the worst case", CLEAN: "on clean images"}.get(about["under"], f"under {about['under']}")
    return ClaimSummary(f"{over[0]} better than {over[1]} {under}", claim["status"], claim["sentence"], basis)


def _seeds(claim: Mapping[str, Any]) -> str:
    seeds = [each["seed"] if isinstance(each, Mapping) else each for each in claim.get("seeds", [])]
    return f"seeds {', '.join(map(str, seeds))}" if seeds else "several seeds"


def section(sources: Sources) -> Section:
    """The mixture and its baselines."""
    title = "Mixture and baselines"
    if not sources.checked:
        blocks = missing_results("Evaluation", "`dvc repro evaluate` runs it")
        return Section("baselines", title, blocks, in_markdown=True)
    content: list[Block] = [_figure(sources), _table(sources)]
    unchecked = [name for name in _without_experts(sources) if sources.models[name]["verdict"] == NOT_CHECKED]
    if unchecked:
        content.append(Paragraph(_unchecked_note(sources, unchecked)))
    content.append(_legend(sources))
    return Section("baselines", title, tuple(content), in_markdown=True)


def _without_experts(sources: Sources) -> list[str]:
    """All models except single experts."""
    return [name for name in sources.models if not is_expert(name)]


def _unchecked_note(sources: Sources, unchecked: Sequence[str]) -> str:
    best = sources.summary.get("best-expert")
    expert = f" The strongest pre-trained expert under those attacks is {best['name']}." if best else ""
    names = "; ".join(map(model_name, unchecked))
    return (
        f"Without a verdict: {names}. Fewer attacks were run on them, so no worst case is shown, and the mixture is "
        f"compared with them over the common attacks.{expert}"
    )


def _legend(sources: Sources) -> Table:
    described = ((name, glossary.network(name, sources.params)) for name in _without_experts(sources))
    return table(
        "Models",
        ["model", "description"],
        [row([model_name(name), text or ABSENT], emphasis=is_mixture(name)) for name, text in described],
    )


def _figure(sources: Sources) -> Block:
    checked = sources.checked
    series = assign_colours((name.removeprefix(BASELINE) for name in checked), sources.networks)
    shown = list(sources.printable)
    if not shown:
        return Paragraph("The robust accuracy of every model is withheld.")
    rows = [_dot(name, checked[name]["accuracy"], series[name.removeprefix(BASELINE)]) for name in shown]
    left_out = [model_name(name) for name in checked if name not in shown]
    note = f" Withheld: {', '.join(left_out)}." if left_out else ""
    return interval_plot(
        "baselines",
        "Worst case over all attacks",
        f"Worst-case accuracy of each checked model in per cent, with 95 % Wilson intervals.{note}",
        rows,
        axis="accuracy, %",
        meaning={"filled": "worst case over all attacks, 95 % interval", "hollow": "clean images"},
        limits=(0, 101),
    )


def _dot(name: str, accuracy: Mapping[str, Any], series: int) -> IntervalPoint:
    worst, clean = accuracy[WORST], accuracy[CLEAN]
    value, low, high = (round(100 * worst[key], 1) for key in ("accuracy", "low", "high"))
    return IntervalPoint(model_name(name), value, low, high, 100 * clean["accuracy"], series)


def _table(sources: Sources) -> Block:
    models = _without_experts(sources)
    common = [
        kind for kind in sources.models[MIXTURE]["accuracy"] if kind != WORST and _all_attacked(sources, models, kind)
    ]
    columns = ["model", *common, "worst case", "worst case, mixture minus model", "p", "verdict"]
    return table(
        "Accuracy in % with 95 % Wilson intervals over the test images, one training run each; differences in "
        "points with paired bootstrap intervals; p: exact McNemar test, not corrected for the number of rows",
        columns,
        [_row(sources, name, common) for name in models],
    )


def _all_attacked(sources: Sources, models: Sequence[str], kind: str) -> bool:
    return all(kind in sources.models[name]["accuracy"] for name in models)


def _row(sources: Sources, name: str, common: Sequence[str]) -> Row:
    model = sources.models[name]
    paired = sources.models[MIXTURE].get("against", {}).get(name)
    checked = model["verdict"] != NOT_CHECKED
    return row(
        [
            model_name(name),
            *(interval(model["accuracy"][kind]) for kind in common),
            interval(model["accuracy"][WORST]) if checked else ABSENT,
            *_difference_to_mixture(sources, name, paired),
            Cell(model["verdict"], status=model["verdict"]) if checked else ABSENT,
        ],
        emphasis=is_mixture(name),
    )


def _difference_to_mixture(sources: Sources, name: str, paired: Mapping[str, Any] | None) -> tuple[str, str]:
    if paired is None:
        return ABSENT, ABSENT
    withheld = any(sources.models[each]["accuracy"][WORST] is None for each in (MIXTURE, name))
    # a difference would disclose the withheld accuracy
    return ("withheld", ABSENT) if withheld else (difference(paired), p_value(paired["p"]))

"""The sections on data poisoning, model extraction and membership inference."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advmoe.core import paths
from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report.document import Block, Paragraph, Picture, Section, missing_results, row, table
from advmoe.reporting.report.figures import IntervalPoint, Line, assign_colours, html_id, interval_plot, line_plot
from advmoe.reporting.report.formats import ABSENT, NBSP, radius
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import PairedDifference
from advmoe.threats.extraction.report import COLUMNS as EXTRACTION_COLUMNS
from advmoe.threats.extraction.report import CONTROL
from advmoe.threats.extraction.report import CONTROL_DIFFERENCES as EXTRACTION_REFERENCES
from advmoe.threats.poisoning.report import BRACKETED as POISONING_REFERENCES
from advmoe.threats.poisoning.report import COLUMNS as POISONING_COLUMNS
from advmoe.threats.poisoning.report import VICTIM_TITLES
from advmoe.threats.results import MeanRange, aggregate_runs, from_json, mean

ANSWER_NAMES = {"soft": "probabilities", "top1": "the class"}
POISONING_NOTE = (
    "The attacker changes a fraction (rate) of the training data. Each victim is trained on it with the configuration "
    "of the pipeline; its twin is the same network trained on clean data. ASR, attack success rate: the fraction of "
    "test images of other classes that are classified as the target class with the trigger; recovered: the fraction "
    "that is still classified correctly. PGD: accuracy under PGD at the threat model's epsilon."
)
EXTRACTION_NOTE = (
    "The attacker trains a surrogate on the outputs of the victim. Fidelity: how often surrogate and victim predict "
    "the same class. Control: the same network trained without queries on the attacker's own labelled images; the "
    "difference to it is the effect of the queries. PGD accuracy and fidelity: on test images attacked by PGD. "
    "Transfer ASR: the fraction of the victim's correct predictions that PGD on the surrogate makes wrong. PRADA: a "
    "detector of extraction, based on the distribution of distances between queries."
)
MEMBERSHIP_NOTE = (
    "The attacker predicts from the output of a network whether an image was in its training set. AUC: area under the "
    "ROC curve, 0.5 is chance. TPR at a FPR: the true positive rate at a fixed false positive rate. Adversarial "
    "queries: the images are attacked by PGD first. Shadows: shadow models that calibrate the score."
)
Runs = Sequence[Mapping[str, Any]]
Groups = dict[tuple[Any, ...], Runs]
Series = Mapping[str, int]


def poisoning_section(sources: Sources) -> Section:
    """The poisoning experiments that are in params.yaml."""
    title = "Data poisoning"
    blocks = [
        block for name, experiment in sources.poison.items() for block in _poison_blocks(sources, name, experiment)
    ]
    hint = "`dvc repro` runs the attacks of `poison.attacks`"
    return _section("poisoning", title, POISONING_NOTE, blocks, missing_results("Data poisoning", hint))


def _section(name: str, title: str, note: str, blocks: Sequence[Block], absent: tuple[Block, ...]) -> Section:
    """A section with an explanatory note, or the text for missing results."""
    return Section(name, title, (Paragraph(note), *blocks) if blocks else absent, in_markdown=True)


def _poison_blocks(sources: Sources, name: str, experiment: Mapping[str, Any]) -> Iterable[Block]:
    groups = _grouped(experiment["runs"], ("victim", "rate", "defence"))
    yield _poison_table(name, experiment, groups)
    rates = {key: runs for key, runs in groups.items() if not key[2] and "asr" in runs[0]}
    if rates:
        yield _success_figure(sources, name, rates)
    picture = sources.snapshot.read(paths.PLOTS / "poison" / name / "examples.png")
    if picture is not None:
        uri = "data:image/png;base64," + base64.b64encode(picture).decode()
        title = f"{name}: original images (top), poisoned images (middle), difference (bottom)"
        yield Picture(title, f"Rows of training images: clean, poisoned by {name}, and their difference.", uri, True)


def _victim(name: str) -> str:
    return VICTIM_TITLES.get(name, name)


def _grouped(runs: Runs, keys: Sequence[str]) -> Groups:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return dict(groups)


def _poison_table(name: str, experiment: Mapping[str, Any], groups: Groups) -> Block:
    columns = [key for key in POISONING_COLUMNS if any(key in runs[0] for runs in groups.values())]
    defended = any(defence for _, _, defence in groups)
    rows = [
        row(
            [
                _victim(victim),
                f"{100 * rate:g} %",
                *([defence or "none"] if defended else []),
                *(_cell(runs, key, POISONING_REFERENCES.get(key)) for key in columns),
            ],
            emphasis=victim == MIXTURE,
        )
        for (victim, rate, defence), runs in groups.items()
    ]
    base = experiment["runs"][0]["rate_of"]
    titles = [
        "victim",
        "rate",
        *(["defence"] if defended else []),
        *(_title(POISONING_COLUMNS, key, POISONING_REFERENCES, "twin") for key in columns),
    ]
    return table(
        f"{name}: % on {experiment['images']} test images; rate: fraction of {base}; {_runs_note(experiment['runs'])}",
        titles,
        rows,
    )


def _title(columns: Mapping[str, str], key: str, references: Mapping[str, str], reference: str) -> str:
    column = references.get(key, "")
    return columns[key] + (f" (minus {reference})" if column.startswith("d_") else f" ({reference})" if column else "")


def _runs_note(runs: Runs) -> str:
    """The number of runs, and the meaning of the brackets."""
    seeds = len({(run["seed"], run.get("trial", 0)) for run in runs})
    return "one seed, 95 % intervals over images" if seeds == 1 else f"{seeds} runs, mean (lowest to highest)"


def _cell(runs: Runs, key: str, reference: str | None) -> str:
    if not all(key in run for run in runs):
        return ABSENT
    text = str(_aggregate(runs, key)).replace(", ", f",{NBSP}")
    if reference is None or not all(reference in run for run in runs):
        return text
    other = _aggregate(runs, reference)
    if isinstance(other, PairedDifference):
        return f"{text} ({str(other).replace(' ', NBSP)})"
    return f"{text} ({100 * mean(other):{'+' if reference.startswith('d_') else ''}.1f})"


def _aggregate(runs: Runs, key: str) -> Any:
    numbers = [from_json(run[key]) for run in runs]
    # targets of one image each: pool them to one rate
    pooled = len(numbers) > 1 and key.startswith("success")
    return Proportion.pooled(numbers) if pooled else aggregate_runs(numbers)


def _bounds(number: Any) -> tuple[float, float]:
    """The ends of an interval, or the minimum and maximum over runs."""
    return (number.lowest, number.highest) if isinstance(number, MeanRange) else (number.low, number.high)


def _success_figure(sources: Sources, name: str, groups: Groups) -> Block:
    """Attack success rate against the poisoning rate if there are several rates, else by victim."""
    sentence = f"{name}: fraction of test images of other classes classified as the target class with the trigger."
    by_rate = len({rate for _, rate, _ in groups}) > 1
    draw = _success_lines if by_rate else _success_dots
    series = assign_colours([victim for victim, _, _ in groups], sources.networks)
    return draw(f"asr-{html_id(name)}", f"{name}: attack success rate", sentence, groups, series)


def _success_dots(identity: str, title: str, sentence: str, groups: Groups, series: Series) -> Block:
    rows = []
    for (victim, rate, _), runs in groups.items():
        asr = _aggregate(runs, "asr")
        low, high = (round(100 * each, 1) for each in _bounds(asr))
        twin = 100 * mean(_aggregate(runs, "asr_clean_twin"))
        rows.append(
            IntervalPoint(
                f"{_victim(victim)}, {100 * rate:g} %",
                round(100 * mean(asr), 1),
                low,
                high,
                twin,
                series[victim],
            )
        )
    meaning = {"filled": "victim", "hollow": "its clean twin"}
    return interval_plot(
        identity, title, sentence, rows, axis="attack success rate, %", meaning=meaning, limits=(-2, 102)
    )


def _success_lines(identity: str, title: str, sentence: str, groups: Groups, series: Series) -> Block:
    victims = list(dict.fromkeys(victim for victim, _, _ in groups))
    series_lines = []
    for victim in victims:
        points = sorted((rate, _aggregate(runs, "asr")) for (name, rate, _), runs in groups.items() if name == victim)
        series_lines.append(_line(_victim(victim), [(100 * rate, number) for rate, number in points], series[victim]))
    labels = ("poisoned fraction, %", "attack success rate, %")
    return line_plot(
        identity, title, _describe(sentence, series_lines), series_lines, axes_labels=labels, limits=(-2, 102)
    )


def _line(label: str, points: Sequence[tuple[float, Any]], series: int, dash: int = 0) -> Line:
    ends = [_bounds(number) for _, number in points]
    bounds = tuple(100 * low for low, _ in ends), tuple(100 * high for _, high in ends)
    xs, ys = tuple(at for at, _ in points), tuple(100 * mean(number) for _, number in points)
    return Line(label, xs, ys, series, bounds, dash=dash)


def _describe(sentence: str, series_lines: Sequence[Line]) -> str:
    texts = (
        f"{line.label}: " + ", ".join(f"{y:.1f} % at {x:g}" for x, y in zip(line.xs, line.ys, strict=True))
        for line in series_lines
    )
    return f"{sentence} {'; '.join(texts)}."


def extraction_section(sources: Sources) -> Section:
    """The extraction experiments that are in params.yaml."""
    blocks = [
        block for name, experiment in sources.extract.items() for block in _extraction_blocks(sources, name, experiment)
    ]
    hint = "`dvc repro` runs the attacks of `extract.attacks`"
    return _section(
        "extraction", "Model extraction", EXTRACTION_NOTE, blocks, missing_results("Model extraction", hint)
    )


def _extraction_blocks(sources: Sources, name: str, experiment: Mapping[str, Any]) -> Iterable[Block]:
    groups = _grouped(experiment["runs"], ("victim", "answers", "surrogate", "budget"))
    yield _extraction_table(name, experiment, groups)
    for key, what in (
        ("fidelity", "agreement of surrogate and victim"),
        ("transfer_asr", "attack success rate of transfer"),
    ):
        members = {group: runs for group, runs in groups.items() if all(key in run for run in runs)}
        if any(group[1] != CONTROL for group in members):
            yield _surrogate_figure(sources, name, what, key, members)


def _surrogate_figure(sources: Sources, name: str, what: str, key: str, groups: Groups) -> Block:
    """A metric against the number of queries if there are several budgets, else by surrogate; with the control."""
    identity, title = f"{key.replace('_', '-')}-{html_id(name)}", f"{name}: {what}"
    axis, series = f"{EXTRACTION_COLUMNS[key]}, %", assign_colours([group[0] for group in groups], sources.networks)
    queried = [group for group in groups if group[1] != CONTROL]
    if len(queried) > len({group[:3] for group in queried}):
        series_lines = _budget_lines(groups, key, series)
        text = _describe(f"{title}, against the number of queries; control: no queries.", series_lines)
        return line_plot(identity, title, text, series_lines, axes_labels=("queries", axis))
    rows = [_with_control(groups, group, key, series) for group in queried]
    meaning = {"filled": "surrogate, 95 % interval", "hollow": "control: no queries"}
    limits = (-2, 102) if key == "fidelity" else None
    return interval_plot(identity, title, f"{title}.", rows, axis=axis, meaning=meaning, limits=limits)


def _with_control(groups: Groups, group: tuple[Any, ...], key: str, series: Series) -> IntervalPoint:
    number, control = _aggregate(groups[group], key), groups.get((group[0], CONTROL, group[2], 0))
    low, high = (round(100 * each, 1) for each in _bounds(number))
    other = None if control is None else 100 * mean(_aggregate(control, key))
    label = f"{_label(group, groups)}, {group[3]} queries"
    return IntervalPoint(label, round(100 * mean(number), 1), low, high, other, series[group[0]])


def _label(group: tuple[Any, ...], groups: Groups) -> str:
    """Victim, kind of answers, and the surrogate if there are several."""
    victim, answers, surrogate = group[:3]
    kind = "control" if answers == CONTROL else ANSWER_NAMES.get(answers, str(answers))
    return ", ".join([victim, kind, *([surrogate] if len(_surrogates(groups)) > 1 else [])])


def _surrogates(groups: Groups) -> list[str]:
    return list(dict.fromkeys(group[2] for group in groups))


def _extraction_table(name: str, experiment: Mapping[str, Any], groups: Groups) -> Block:
    columns = [key for key in EXTRACTION_COLUMNS if any(key in runs[0] for runs in groups.values())]
    surrogates = _surrogates(groups)
    several = len(surrogates) > 1
    rows = [
        row(
            [
                victim,
                "none (control)" if answers == CONTROL else ANSWER_NAMES.get(answers, str(answers)),
                *([surrogate] if several else []),
                str(budget),
                *(_cell(runs, key, EXTRACTION_REFERENCES.get(key)) for key in columns),
                _alarm(runs),
            ],
            emphasis=victim == MIXTURE,
        )
        for (victim, answers, surrogate, budget), runs in groups.items()
    ]
    titles = ["victim", "answers", *(["surrogate"] if several else []), "queries"]
    titles += [_title(EXTRACTION_COLUMNS, key, EXTRACTION_REFERENCES, "control") for key in columns]
    surrogate = "" if several else f"surrogate: {surrogates[0]}; "
    caption = f"{name}: % on {experiment['images']} test images; {surrogate}{_runs_note(experiment['runs'])}"
    return table(caption, [*titles, "PRADA alarm"], rows)


def _alarm(runs: Runs) -> str:
    if not all("alarm_after" in run for run in runs):
        return ABSENT
    after = [run["alarm_after"] for run in runs]
    return ", ".join("never" if each is None else f"after {each} queries" for each in dict.fromkeys(after))


def _budget_lines(groups: Groups, key: str, series: Series) -> list[Line]:
    """A line for each victim, kind of answers and surrogate; the control is constant."""
    budgets = [group[3] for group in groups if group[1] != CONTROL]
    result: list[Line] = []
    for kind in dict.fromkeys(group[:3] for group in groups):
        points = sorted((group[3], _aggregate(runs, key)) for group, runs in groups.items() if group[:3] == kind)
        if kind[1] == CONTROL:
            points = [(budget, points[0][1]) for budget in (min(budgets), max(budgets))]
        dash = sum(line.series == series[kind[0]] for line in result)  # lines of one victim differ in their dashes
        result.append(_line(_label(kind, groups), points, series[kind[0]], dash))
    return result


def membership_section(sources: Sources) -> Section:
    """The membership inference attacks on the networks."""
    title = "Membership inference"
    results = sources.membership
    absent = missing_results("Membership inference", "`dvc repro membership` runs it")
    blocks = (
        ()
        if results is None
        else (_auc_figure(results, sources.networks), _membership_table(results, _reference_victim(sources)))
    )
    return _section("membership", title, MEMBERSHIP_NOTE, blocks, absent)


def _reference_victim(sources: Sources) -> str:
    """The victim with which the others are compared."""
    return str(sources.params.get("membership", {}).get("against", "the reference"))


def _auc_figure(results: Mapping[str, Any], known: Sequence[str]) -> Block:
    series = assign_colours([each["victim"] for each in results["rows"]], known)
    rows = []
    for each in results["rows"]:
        auc = each["leak"]["auc"]
        label = f"{each['victim']}, {each['score']}, {each['queries']} queries"
        rows.append(IntervalPoint(label, auc["value"], auc["low"], auc["high"], None, series[each["victim"]]))
    sentence = "Area under the ROC curve of each membership inference attack; 0.5 is chance."
    return interval_plot(
        "membership", "AUC of membership inference", sentence, rows, axis="AUC; 0.5 is chance", meaning={}
    )


def _membership_table(results: Mapping[str, Any], against: str) -> Block:
    rates = list(results["rows"][0]["leak"]["tpr"])
    rows = [
        row(
            [
                each["victim"],
                each["score"],
                each["queries"],
                str(each["shadows"]),
                _estimate(each["leak"]["auc"], "{:.3f} [{:.3f}, {:.3f}]"),
                ABSENT if each["beyond"] is None else _estimate(each["beyond"], "{:+.3f} [{:+.3f}, {:+.3f}]"),
                *(_estimate(each["leak"]["tpr"][rate], "{:.1f} [{:.1f}, {:.1f}]", 100) for rate in rates),
            ],
            emphasis=each["victim"] == MIXTURE,
        )
        for each in results["rows"]
    ]
    caption = (
        f"{results['members']} training images and {results['others']} other images, 95 % bootstrap intervals; "
        f"adversarial queries at L-inf epsilon {radius(results['epsilon'])}"
    )
    titles = [f"TPR at {100 * float(rate):g} % FPR, %" for rate in rates]
    return table(
        caption, ["victim", "score", "queries", "shadows", "AUC", f"AUC minus that of {against}", *titles], rows
    )


def _estimate(estimate: Mapping[str, float], form: str, scale: float = 1) -> str:
    return form.format(*(scale * estimate[key] for key in ("value", "low", "high")))

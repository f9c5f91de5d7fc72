"""What an attacker gets who writes the training data, who can only ask, or who wonders which images were trained on."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advmoe.core import paths
from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report.document import Block, Paragraph, Picture, Section, missing, row, table
from advmoe.reporting.report.figures import Dot, Line, anchor, colours, dots, lines
from advmoe.reporting.report.formats import ABSENT, NBSP, radius
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import PairedDifference
from advmoe.threats.extraction.report import BESIDE as MINUS_CONTROL
from advmoe.threats.extraction.report import COLUMNS as STOLEN
from advmoe.threats.extraction.report import CONTROL
from advmoe.threats.poisoning.report import BESIDE as BESIDE_TWIN
from advmoe.threats.poisoning.report import COLUMNS as POISONED
from advmoe.threats.poisoning.report import MEANING
from advmoe.threats.results import Spread, from_json, mean, over_runs

TOLD = {"soft": "probabilities", "top1": "the class"}
POISONING = (
    "The attacker changes a part of the training data (rate). Each victim is trained on it by the pipeline's own "
    "recipe; its twin is the same network trained on clean data. ASR, attack success rate: of the test images of "
    "other classes, the share that becomes the attacker's target once the trigger is on them; recovered: the share "
    "that keeps its true class all the same. PGD: accuracy under PGD at the threat model's epsilon."
)
EXTRACTION = (
    "The attacker sees only answers and trains a network of its own on them, the surrogate. Fidelity: how often it "
    "answers as the victim does. Control: the same network, never having asked, trained on the attacker's own "
    "labelled images; what asking is worth is the difference to it. PGD accuracy and fidelity: on test images "
    "attacked by PGD. Transfer ASR: of the victim's right answers, the share that PGD against the surrogate spoils. "
    "PRADA: a detector of extraction, which looks for queries unlike natural ones."
)
MEMBERSHIP = (
    "The attacker wants to know whether an image was trained on, from what a network says of it. AUC: the chance that "
    "a training image looks more like one than another image does; 0.5 is guessing. TPR at a FPR: training images "
    "found while that share of other images is blamed. Adversarial queries: the images are attacked by PGD first. "
    "Shadows: networks that the attacker trains to calibrate the score."
)
Runs = Sequence[Mapping[str, Any]]
Groups = dict[tuple[Any, ...], Runs]
Series = Mapping[str, int]


def poisoning(sources: Sources) -> Section:
    """Every study of poisoning that params.yaml lists."""
    title = "Poisoned training data"
    blocks = [block for name, study in sources.poison.items() for block in _poison(sources, name, study)]
    how = "`dvc repro` runs the attacks that `poison.attacks` lists"
    return _explained("poisoning", title, POISONING, blocks, missing("Studies of poisoning", how))


def _explained(name: str, title: str, words: str, blocks: Sequence[Block], absent: tuple[Block, ...]) -> Section:
    """A section that says first what its numbers mean, or that there are none."""
    return Section(name, title, (Paragraph(words), *blocks) if blocks else absent, brief=True)


def _poison(sources: Sources, name: str, study: Mapping[str, Any]) -> Iterable[Block]:
    groups = _grouped(study["runs"], ("victim", "rate", "defence"))
    yield _poison_table(name, study, groups)
    rates = {key: runs for key, runs in groups.items() if not key[2] and "asr" in runs[0]}
    if rates:
        yield _success(sources, name, rates)
    picture = sources.record.read(paths.PLOTS / "poison" / name / "examples.png")
    if picture is not None:
        uri = "data:image/png;base64," + base64.b64encode(picture).decode()
        title = f"{name}: images above, poisoned in the middle, the difference below"
        yield Picture(title, f"Rows of training images: clean, poisoned by {name}, and their difference.", uri, True)


def _victim(name: str) -> str:
    return MEANING.get(name, name)


def _grouped(runs: Runs, keys: Sequence[str]) -> Groups:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(tuple(run[key] for key in keys), []).append(run)
    return dict(found)


def _poison_table(name: str, study: Mapping[str, Any], groups: Groups) -> Block:
    columns = [key for key in POISONED if any(key in runs[0] for runs in groups.values())]
    defended = any(defence for _, _, defence in groups)
    rows = [
        row(
            [
                _victim(victim),
                f"{100 * rate:g} %",
                *([defence or "none"] if defended else []),
                *(_cell(runs, key, BESIDE_TWIN.get(key)) for key in columns),
            ],
            emphasis=victim == MIXTURE,
        )
        for (victim, rate, defence), runs in groups.items()
    ]
    of = study["runs"][0]["rate_of"]
    titles = [
        "victim",
        "rate",
        *(["defence"] if defended else []),
        *(_title(POISONED, key, BESIDE_TWIN, "twin") for key in columns),
    ]
    return table(
        f"{name}: % on {study['images']} test images; the rate is a share of {of}; {_ran(study['runs'])}", titles, rows
    )


def _title(columns: Mapping[str, str], key: str, beside: Mapping[str, str], whom: str) -> str:
    other = beside.get(key, "")
    return columns[key] + (f" (minus {whom})" if other.startswith("d_") else f" ({whom})" if other else "")


def _ran(runs: Runs) -> str:
    """How many runs stand behind a number, and what its brackets mean."""
    seeds = len({(run["seed"], run.get("trial", 0)) for run in runs})
    return "one seed, 95 % intervals over images" if seeds == 1 else f"{seeds} runs, mean (lowest to highest)"


def _cell(runs: Runs, key: str, beside: str | None) -> str:
    if not all(key in run for run in runs):
        return ABSENT
    shown = str(_over(runs, key)).replace(", ", f",{NBSP}")
    if beside is None or not all(beside in run for run in runs):
        return shown
    other = _over(runs, beside)
    if isinstance(other, PairedDifference):
        return f"{shown} ({str(other).replace(' ', NBSP)})"
    return f"{shown} ({100 * mean(other):{'+' if beside.startswith('d_') else ''}.1f})"


def _over(runs: Runs, key: str) -> Any:
    numbers = [from_json(run[key]) for run in runs]
    # hits of targets, one image each: ten targets make one rate
    pooled = len(numbers) > 1 and key.startswith("success")
    return Share.pooled(numbers) if pooled else over_runs(numbers)


def _bounds(number: Any) -> tuple[float, float]:
    """The ends of an interval, or the lowest and highest run."""
    return (number.lowest, number.highest) if isinstance(number, Spread) else (number.low, number.high)


def _success(sources: Sources, name: str, groups: Groups) -> Block:
    """Against the rate where there are several, else victim by victim."""
    sentence = f"{name}: share of test images of other classes that become the target under the trigger."
    by_rate = len({rate for _, rate, _ in groups}) > 1
    draw = _success_lines if by_rate else _success_dots
    series = colours([victim for victim, _, _ in groups], sources.networks)
    return draw(f"asr-{anchor(name)}", f"{name}: attack success rate", sentence, groups, series)


def _success_dots(identity: str, title: str, sentence: str, groups: Groups, series: Series) -> Block:
    rows = []
    for (victim, rate, _), runs in groups.items():
        asr = _over(runs, "asr")
        low, high = (round(100 * each, 1) for each in _bounds(asr))
        twin = 100 * mean(_over(runs, "asr_clean_twin"))
        rows.append(
            Dot(
                f"{_victim(victim)}, {100 * rate:g} %",
                round(100 * mean(asr), 1),
                low,
                high,
                twin,
                series[victim],
            )
        )
    meaning = {"filled": "victim", "hollow": "its clean twin"}
    return dots(identity, title, sentence, rows, axis="attack success rate, %", meaning=meaning, limits=(-2, 102))


def _success_lines(identity: str, title: str, sentence: str, groups: Groups, series: Series) -> Block:
    victims = list(dict.fromkeys(victim for victim, _, _ in groups))
    found = []
    for victim in victims:
        mine = sorted((rate, _over(runs, "asr")) for (who, rate, _), runs in groups.items() if who == victim)
        found.append(_whiskers(_victim(victim), [(100 * rate, number) for rate, number in mine], series[victim]))
    labels = ("share that is poisoned, %", "attack success rate, %")
    return lines(identity, title, _said(sentence, found), found, axes_labels=labels, limits=(-2, 102))


def _whiskers(label: str, points: Sequence[tuple[float, Any]], series: int, dash: int = 0) -> Line:
    ends = [_bounds(number) for _, number in points]
    bounds = tuple(100 * low for low, _ in ends), tuple(100 * high for _, high in ends)
    xs, ys = tuple(at for at, _ in points), tuple(100 * mean(number) for _, number in points)
    return Line(label, xs, ys, series, bounds, dash=dash)


def _said(sentence: str, found: Sequence[Line]) -> str:
    said = (
        f"{line.label}: " + ", ".join(f"{y:.1f} % at {x:g}" for x, y in zip(line.xs, line.ys, strict=True))
        for line in found
    )
    return f"{sentence} {'; '.join(said)}."


def extraction(sources: Sources) -> Section:
    """Every study of extraction that params.yaml lists, and the audit of membership."""
    blocks = [block for name, study in sources.extract.items() for block in _extract(sources, name, study)]
    how = "`dvc repro` runs the attacks that `extract.attacks` lists"
    return _explained("extraction", "Stolen by asking", EXTRACTION, blocks, missing("Studies of extraction", how))


def _extract(sources: Sources, name: str, study: Mapping[str, Any]) -> Iterable[Block]:
    groups = _grouped(study["runs"], ("victim", "answers", "surrogate", "budget"))
    yield _stolen(name, study, groups)
    for key, what in (
        ("fidelity", "agreement of surrogate and victim"),
        ("transfer_asr", "right answers spoiled by transfer"),
    ):
        members = {who: runs for who, runs in groups.items() if all(key in run for run in runs)}
        if any(who[1] != CONTROL for who in members):
            yield _gained(sources, name, what, key, members)


def _gained(sources: Sources, name: str, what: str, key: str, groups: Groups) -> Block:
    """Against the queries where a surrogate had several budgets, else surrogate by surrogate; the control beside."""
    identity, title = f"{key.replace('_', '-')}-{anchor(name)}", f"{name}: {what}"
    axis, series = f"{STOLEN[key]}, %", colours([who[0] for who in groups], sources.networks)
    asked = [who for who in groups if who[1] != CONTROL]
    if len(asked) > len({who[:3] for who in asked}):
        found = _budgets(groups, key, series)
        said = _said(f"{title}, against the number of queries; control: nothing was asked.", found)
        return lines(identity, title, said, found, axes_labels=("queries", axis))
    rows = [_beside_control(groups, who, key, series) for who in asked]
    meaning = {"filled": "surrogate, 95 % interval", "hollow": "control: nothing was asked"}
    limits = (-2, 102) if key == "fidelity" else None
    return dots(identity, title, f"{title}.", rows, axis=axis, meaning=meaning, limits=limits)


def _beside_control(groups: Groups, who: tuple[Any, ...], key: str, series: Series) -> Dot:
    number, control = _over(groups[who], key), groups.get((who[0], CONTROL, who[2], 0))
    low, high = (round(100 * each, 1) for each in _bounds(number))
    other = None if control is None else 100 * mean(_over(control, key))
    label = f"{_told(who, groups)}, {who[3]} queries"
    return Dot(label, round(100 * mean(number), 1), low, high, other, series[who[0]])


def _told(who: tuple[Any, ...], groups: Groups) -> str:
    """Whose answers a surrogate learned, what it was told, and which network it is where there are several."""
    victim, answers, surrogate = who[:3]
    told = "control" if answers == CONTROL else TOLD.get(answers, str(answers))
    return ", ".join([victim, told, *([surrogate] if len(_surrogates(groups)) > 1 else [])])


def _surrogates(groups: Groups) -> list[str]:
    return list(dict.fromkeys(who[2] for who in groups))


def _stolen(name: str, study: Mapping[str, Any], groups: Groups) -> Block:
    columns = [key for key in STOLEN if any(key in runs[0] for runs in groups.values())]
    surrogates = _surrogates(groups)
    several = len(surrogates) > 1
    rows = [
        row(
            [
                victim,
                "nothing: control" if answers == CONTROL else TOLD.get(answers, str(answers)),
                *([surrogate] if several else []),
                str(budget),
                *(_cell(runs, key, MINUS_CONTROL.get(key)) for key in columns),
                _alarm(runs),
            ],
            emphasis=victim == MIXTURE,
        )
        for (victim, answers, surrogate, budget), runs in groups.items()
    ]
    titles = ["victim", "told", *(["surrogate"] if several else []), "queries"]
    titles += [_title(STOLEN, key, MINUS_CONTROL, "control") for key in columns]
    which = "" if several else f"surrogate: {surrogates[0]}; "
    caption = f"{name}: % on {study['images']} test images; {which}{_ran(study['runs'])}"
    return table(caption, [*titles, "PRADA's alarm"], rows)


def _alarm(runs: Runs) -> str:
    if not all("alarm_after" in run for run in runs):
        return ABSENT
    after = [run["alarm_after"] for run in runs]
    return ", ".join("never" if each is None else f"after {each} queries" for each in dict.fromkeys(after))


def _budgets(groups: Groups, key: str, series: Series) -> list[Line]:
    """A line for each victim, kind of answer and surrogate; the control, which asked nothing, is level."""
    ends = [who[3] for who in groups if who[1] != CONTROL]
    found: list[Line] = []
    for kind in dict.fromkeys(who[:3] for who in groups):
        points = sorted((who[3], _over(runs, key)) for who, runs in groups.items() if who[:3] == kind)
        if kind[1] == CONTROL:
            points = [(end, points[0][1]) for end in (min(ends), max(ends))]
        before = sum(line.series == series[kind[0]] for line in found)  # a victim has one colour, its lines many dashes
        found.append(_whiskers(_told(kind, groups), points, series[kind[0]], before))
    return found


def membership(sources: Sources) -> Section:
    """Which training images the networks give away."""
    title = "Membership: which images were trained on?"
    audit = sources.membership
    absent = missing("The membership audit", "`dvc repro membership` runs it")
    blocks = () if audit is None else (_leaks(audit, sources.networks), _leak_table(audit, _against(sources)))
    return _explained("membership", title, MEMBERSHIP, blocks, absent)


def _against(sources: Sources) -> str:
    """The victim that the others are compared with."""
    return str(sources.params.get("membership", {}).get("against", "the one compared with"))


def _leaks(audit: Mapping[str, Any], known: Sequence[str]) -> Block:
    series = colours([each["victim"] for each in audit["rows"]], known)
    rows = []
    for each in audit["rows"]:
        auc = each["leak"]["auc"]
        label = f"{each['victim']}, {each['score']}, {each['queries']} queries"
        rows.append(Dot(label, auc["value"], auc["low"], auc["high"], None, series[each["victim"]]))
    sentence = "Area under the ROC curve of each membership test; 0.5 is chance."
    return dots("membership", "How well members can be told", sentence, rows, axis="AUC; 0.5 is chance", meaning={})


def _leak_table(audit: Mapping[str, Any], against: str) -> Block:
    rates = list(audit["rows"][0]["leak"]["tpr"])
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
        for each in audit["rows"]
    ]
    caption = (
        f"{audit['members']} training images against {audit['others']} others, 95 % bootstrap intervals; adversarial "
        f"queries at L-inf epsilon {radius(audit['epsilon'])}"
    )
    titles = [f"TPR at {100 * float(rate):g} % FPR, %" for rate in rates]
    return table(
        caption, ["victim", "score", "queries", "shadows", "AUC", f"AUC minus that of {against}", *titles], rows
    )


def _estimate(found: Mapping[str, float], form: str, scale: float = 1) -> str:
    return form.format(*(scale * found[key] for key in ("value", "low", "high")))

"""The section that compares this run with the paper (arXiv 2512.20821, version 2).

The column `paper` paraphrases the paper; the other columns are computed from params.yaml.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report.document import Link, Paragraph, Section, missing_results, row, table
from advmoe.reporting.report.formats import ABSENT, interval
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.decisions import CLEAN, WORST

PAPER = "https://arxiv.org/abs/2512.20821"
FGSM_EPSILONS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
PGD_STEPS = [10, 20, 30, 40, 50]
PAPER_WIDTH = 64  # channels of the first stage of a full ResNet-18
PAPER_EXPERTS = {"clean": 1, "fgsm": 4, "pgd": 4}
PAPER_BATCHES = {"clean", "fgsm", "pgd"}
PAPER_RECIPE = "dwf"
PAPER_ATTACKS = ("fgsm", "pgd")
PAPER_SOURCES = ("cifar10", "svhn")
NONE = "none"

Params = Mapping[str, Any]


@dataclass(frozen=True)
class ComparisonRow:
    """A row of the comparison; `ours` and `deviation` are computed from params.yaml."""

    what: str
    paper: str
    ours: Callable[[Params], str]
    deviation: Callable[[Params], str]


def section(sources: Sources) -> Section:
    """The comparison with the paper. Keys that a params.yaml lacks give empty cells."""
    title = "Comparison with the paper"
    if not sources.params:
        return Section("paper", title, missing_results("Comparison with the paper", "it needs params.yaml"))
    rows = [row([each.what, each.paper, _read(each.ours, sources), _read(each.deviation, sources)]) for each in ROWS]
    rows.append(
        row(["result", "accuracy under FGSM and PGD, above earlier mixtures of experts", _results(sources), "-"])
    )
    blocks = (
        table(
            "Settings of the paper and of this run",
            ["", "paper", "this run", "deviation"],
            rows,
        ),
        Paragraph(
            "The paper reports, in words, that its mixture outperforms other mixtures and plain classifiers with more "
            "complex backbones under FGSM and PGD on CIFAR-10 and SVHN. Its tables were not available, so none of "
            "its numbers are quoted; only full-size runs on its data sets would be comparable."
        ),
        Link("The paper: arXiv 2512.20821", PAPER),
    )
    return Section("paper", title, blocks)


def _results(sources: Sources) -> str:
    """The accuracies of the mixture: clean, under FGSM and PGD, worst case."""
    mixture = sources.models.get(MIXTURE)
    if mixture is None:
        return "not evaluated"
    named = [name for name, each in mixture["attacks"].items() if each["settings"]["kind"] in PAPER_ATTACKS]
    return "; ".join(f"{name} {interval(mixture['accuracy'][name])}" for name in (CLEAN, *named, WORST))


def _read(value: Callable[[Params], str], sources: Sources) -> str:
    try:
        return value(sources.params)
    except (KeyError, TypeError, AttributeError):
        return ABSENT


def _kinds(params: Params) -> dict[str, int]:
    kinds = [params["experts"][name]["adversary"]["kind"] for name in params["train"]["experts"]]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _experts(params: Params) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in _kinds(params).items())
    return f"{sum(_kinds(params).values())} {params['model']['kind']}, width {params['model']['width']}: {kinds}"


def _experts_deviation(params: Params) -> str:
    model = params["model"]
    deviations = [
        "" if model["kind"] == "resnet18" else f"backbone {model['kind']}",
        "" if model["width"] == PAPER_WIDTH else f"width {model['width']} instead of {PAPER_WIDTH}",
        "" if _kinds(params) == PAPER_EXPERTS else "other experts",
    ]
    return ", ".join(filter(None, deviations)) or NONE


def _value_lists(params: Params, kind: str, key: str) -> list[Any]:
    """Returns the distinct lists of values that the experts of a kind draw from."""
    adversaries = [params["experts"][name]["adversary"] for name in params["train"]["experts"]]
    lists = [list(each[key]) for each in adversaries if each["kind"] == kind]
    return [each for index, each in enumerate(lists) if each not in lists[:index]]


def _values_of(kind: str, key: str) -> Callable[[Params], str]:
    return lambda params: "; ".join(", ".join(map(str, each)) for each in _value_lists(params, kind, key)) or ABSENT


def _values_deviation(kind: str, key: str, paper: list[Any]) -> Callable[[Params], str]:
    def deviation(params: Params) -> str:
        values = _value_lists(params, kind, key)
        return NONE if values == [paper] else "other values" if values else "no such expert"

    return deviation


def _gate(params: Params) -> str:
    gate = params["train"]["gate"]
    return f"convolutions of width {gate['width']}, softmax at temperature {gate['temperature']:g}, no top-k"


def _joint(params: Params) -> str:
    return "; ".join([_batches(params["train"]["adversary"]), *_additions(params)])


def _batches(adversary: Params) -> str:
    if adversary["kind"] != "mixed":
        return f"{adversary['kind']} in every batch"
    drawn = zip((each["kind"] for each in adversary["of"]), adversary["weights"], strict=True)
    return "drawn per batch: " + ", ".join(f"{kind} (weight {weight:g})" for kind, weight in drawn)


def _additions(params: Params) -> list[str]:
    """Returns what joint training adds to the paper's, or uses instead. Older params.yaml lack these keys."""
    train = params["train"]
    recipe = train.get("recipe", PAPER_RECIPE)
    kind, numbers = (recipe["kind"], recipe) if isinstance(recipe, dict) else (recipe, {})
    values = ", ".join(f"{name} {value:g}" for name, value in numbers.items() if name != "kind")
    other = [] if kind == PAPER_RECIPE else [f"the loss of {kind}" + (f" ({values})" if values else "")]
    named = {"own_loss": "the experts' own losses, weight {:g}", "awp": "weights perturbed by {:g} of their norm"}
    return other + [text.format(train[key]) for key, text in named.items() if train.get(key)]


def _joint_deviation(params: Params) -> str:
    adversary = params["train"]["adversary"]
    weights = zip(adversary.get("of", ()), adversary.get("weights", ()), strict=True)
    drawn = {each["kind"] for each, weight in weights if weight}
    if drawn == PAPER_BATCHES and not _additions(params):
        return _left_open(params)
    return "another recipe"


def _epochs(params: Params) -> str:
    pretrain, train = params["pretrain"], params["train"]
    rates = (each["optimizer"]["lr"] for each in (pretrain, train))
    return (
        f"{pretrain['epochs']} + {train['epochs']} epochs, learning rates {' and '.join(f'{rate:g}' for rate in rates)}"
    )


def _data(params: Params) -> str:
    return str(params["prepare"]["source"]["kind"])


def _evaluated(params: Params) -> str:
    evaluate = params["evaluate"]
    attacks, presets = ", ".join(evaluate["attacks"]), ", ".join(evaluate["presets"])
    return attacks + (f"; presets {presets}" if presets else "") + f"; epsilon {params['epsilon']}"


def _mixing(params: Params) -> str:
    return str(params["train"]["mixing"])


def _data_deviation(params: Params) -> str:
    return NONE if _data(params) in PAPER_SOURCES else "another data set"


def _left_open(_: Params) -> str:
    return "not specified in the paper"


def _more_attacks(_: Params) -> str:
    return "more attacks than the paper's, and ten checks"


ROWS = (
    ComparisonRow(
        "experts",
        "nine ResNet-18: one benign, four on FGSM, four on PGD, each pre-trained separately",
        _experts,
        _experts_deviation,
    ),
    ComparisonRow(
        "FGSM experts",
        "epsilon drawn per batch: 0.01 to 0.09 in steps of 0.01",
        _values_of("fgsm", "epsilons"),
        _values_deviation("fgsm", "epsilons", FGSM_EPSILONS),
    ),
    ComparisonRow(
        "PGD experts",
        "steps drawn per batch: 10, 20, 30, 40, 50",
        _values_of("pgd", "steps"),
        _values_deviation("pgd", "steps", PGD_STEPS),
    ),
    ComparisonRow("gate", "soft: all experts active, fractional weights; its layers are not given", _gate, _left_open),
    ComparisonRow("mixing", "fractional weights for all experts", _mixing, _left_open),
    ComparisonRow(
        "joint training",
        "experts and gate updated together on randomly drawn attacks, clean included",
        _joint,
        _joint_deviation,
    ),
    ComparisonRow("schedule", "-", _epochs, _left_open),
    ComparisonRow("data", "CIFAR-10 and SVHN", _data, _data_deviation),
    ComparisonRow("evaluation", "white-box FGSM and PGD", _evaluated, _more_attacks),
)

"""Robustness over epsilon, and who withstands which attack."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advmoe.core.settings import parse_epsilon
from advmoe.evaluation.summary import BASELINE, JOINT, MIXTURE, PRETRAINED, UNIFORM, WITHHELD, is_expert
from advmoe.reporting.report import glossary, overview
from advmoe.reporting.report.document import Block, Cell, Folded, Paragraph, Row, Section, Table, missing, row, table
from advmoe.reporting.report.figures import Line, colours, lines
from advmoe.reporting.report.formats import ABSENT, interval, is_mixture, model_name, percent, radius
from advmoe.reporting.report.sources import Sources, number
from advmoe.statistics.decisions import CLEAN, WORST

HOW = "`dvc repro evaluate` makes it"
ORACLE = "oracle routing (upper bound)"
EPSILON_AXIS = "L-inf epsilon, share of the pixel range"


def over_epsilon(sources: Sources) -> Section:
    """Accuracy against epsilon: on the fixed grid, and by each image's smallest known epsilon."""
    title = "Robustness over epsilon"
    grid, minimal = sources.table("evaluate", "robustness"), sources.table("evaluate", "minimal-epsilon")
    if not (sources.models and grid):
        return Section("epsilon", title, missing("Curves over epsilon", HOW))
    return Section("epsilon", title, tuple(_curves(sources, grid, minimal)))


def _curves(sources: Sources, grid: list[dict[str, str]], minimal: list[dict[str, str]]) -> Iterable[Block]:
    # plot data holds withheld models too
    names = [name for name in grid[0] if name in sources.printable]
    if not names:
        yield Paragraph("Every judged model's robust accuracy is withheld, so there is nothing to draw.")
        return
    known = [name if name == MIXTURE else BASELINE + name for name in sources.networks]
    series, mark = colours(names, known), (float(sources.summary["epsilon"]), "threat model")
    yield lines(
        "robustness",
        "Accuracy under PGD at growing epsilon",
        _spoken(grid, names),
        [_grid_line(sources, grid, name, series[name]) for name in names],
        axes_labels=(EPSILON_AXIS, "accuracy, %"),
        limits=(0, 101),
        mark=mark,
    )
    yield Folded("The numbers of this figure", (_grid_table(sources, names),))
    models = [name for name in dict.fromkeys(each["model"] for each in minimal) if name in names]
    if models:
        yield lines(
            "minimal",
            "Accuracy left by the smallest perturbation found",
            "Steps that fall where the smallest adversarial perturbation found for an image lies. " + _medians(sources),
            [_steps(minimal, name, series[name]) for name in models],
            axes_labels=(EPSILON_AXIS, "accuracy, %"),
            limits=(0, 101),
            mark=mark,
        )
        yield Paragraph(
            f"{_medians(sources)} The first figure is PGD at a few epsilons. The second looks for the smallest "
            "perturbation of every image, by FAB, and also counts what all attacks found at the threat model's "
            "epsilon: a curve may drop there, because more was tried there. Where the figures disagree the lower "
            "curve is nearer to the truth; both are upper bounds."
        )


def _spoken(grid: list[dict[str, str]], names: Sequence[str]) -> str:
    said = (
        f"{model_name(name)}: "
        + ", ".join(f"{percent(float(each[name]))} % at {each['epsilon']}" for each in grid if each[name])
        for name in names
    )
    return "Accuracy under PGD at growing epsilon. " + "; ".join(said) + "."


def _grid_line(sources: Sources, grid: list[dict[str, str]], name: str, series: int) -> Line:
    points = [(float(each["epsilon"]), number(each[name])) for each in grid]
    known = [(at, 100 * value) for at, value in points if value is not None]
    shares = _grid(sources, name)
    bounds = None
    if all(at in shares for at, _ in known):
        bounds = (
            tuple(100 * shares[at]["low"] for at, _ in known),
            tuple(100 * shares[at]["high"] for at, _ in known),
        )
    return Line(model_name(name), tuple(at for at, _ in known), tuple(value for _, value in known), series, bounds)


def _grid(sources: Sources, name: str) -> dict[float, dict[str, Any]]:
    """Shares of the grid with their intervals, by epsilon."""
    grid = sources.models.get(name, {}).get("grid", {})
    return {round(parse_epsilon(epsilon), 6): share for epsilon, share in grid.items()}


def _grid_table(sources: Sources, names: Sequence[str]) -> Table:
    grids = {name: _grid(sources, name) for name in names}
    radii = sorted({epsilon for grid in grids.values() for epsilon in grid})
    return table(
        "PGD accuracy in % with 95 % Wilson intervals",
        ["epsilon", *map(model_name, names)],
        [row([radius(at), *(_share(grids[name], at) for name in names)]) for at in radii],
    )


def _share(grid: Mapping[Any, Any], key: Any) -> str:
    return interval(grid[key]) if key in grid else ABSENT


def _steps(minimal: list[dict[str, str]], name: str, series: int) -> Line:
    mine = [each for each in minimal if each["model"] == name]
    xs = tuple(float(each["epsilon"]) for each in mine)
    return Line(model_name(name), xs, tuple(100 * float(each["accuracy"]) for each in mine), series, stairs=True)


def _medians(sources: Sources) -> str:
    known = {name: each.get("median_minimal_epsilon") for name, each in sources.judged.items()}
    said = [f"{model_name(name)} {value:.3f}" for name, value in known.items() if value is not None]
    return f"Median of the smallest epsilon found: {', '.join(said)}." if said else "No median is known."


def matrix(sources: Sources) -> Section:
    """Heat maps: model x attack, and expert x attack with oracle routing and the uniform average beside."""
    title = "Attack by attack"
    if not sources.models:
        return Section("attacks", title, missing("The matrix of models and attacks", HOW))
    blocks: list[Block] = [
        _heat(
            "Judged models: accuracy in %, clean, in the worst case and under each attack",
            sources.judged,
            _kinds(sources.judged.values()),
        ),
        *_limited(sources.models[MIXTURE]),
        Folded("What these attacks are, and their settings", (_suite(sources),)),
        Folded("The same with 95 % intervals", (_intervals(sources.judged),)),
        *_experts(sources),
        Folded("The mixture, class by class", (_classes(sources.models[MIXTURE]),)),
    ]
    return Section("attacks", title, tuple(blocks))


def _limited(mixture: Mapping[str, Any]) -> Iterable[Block]:
    """Which attacks met fewer images than the test has."""
    few = overview.limited(mixture)
    if few:
        yield Paragraph(f"Attacks that met fewer than the {mixture['accuracy'][CLEAN]['total']} test images: {few}.")


def _suite(sources: Sources) -> Table:
    """What the attacks are, with the settings they ran with."""
    found = {name: each["settings"] for model in sources.judged.values() for name, each in model["attacks"].items()}
    return table(
        "Attacks and their settings; step sizes are shares of epsilon",
        ["attack", "what it does", "settings"],
        [
            row([name, glossary.ATTACKS.get(each["kind"], ABSENT), glossary.settings(each) or ABSENT])
            for name, each in found.items()
        ],
    )


def _heat(
    caption: str, models: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], extra: Iterable[Row] = ()
) -> Table:
    rows = [_heat_row(model_name(name), each["accuracy"], kinds, is_mixture(name)) for name, each in models.items()]
    return table(caption, ["model", *kinds], [*rows, *extra])


def _kinds(models: Iterable[Mapping[str, Any]]) -> list[str]:
    kinds = list(dict.fromkeys(kind for each in models for kind in each["accuracy"]))
    return sorted(kinds, key=lambda kind: (kind != CLEAN, kind != WORST))


def _heat_row(label: str, accuracy: Mapping[str, Any], kinds: Sequence[str], emphasis: bool = False) -> Row:
    return row([label, *(_heat_cell(accuracy, kind) for kind in kinds)], emphasis=emphasis)


def _heat_cell(accuracy: Mapping[str, Any], kind: str) -> Cell:
    if kind not in accuracy:
        return Cell(ABSENT)
    share = accuracy[kind]
    return Cell(WITHHELD) if share is None else Cell(percent(share["accuracy"]), heat=share["accuracy"])


def _intervals(models: Mapping[str, Mapping[str, Any]]) -> Table:
    kinds = _kinds(models.values())
    rows = [row([kind, *(_share(each["accuracy"], kind) for each in models.values())]) for kind in kinds]
    return table("Accuracy in % with 95 % Wilson intervals", ["attack", *map(model_name, models)], rows)


def _experts(sources: Sources) -> Iterable[Block]:
    experts = {name: each for name, each in sources.models.items() if is_expert(name)}
    if not experts:
        return
    kinds = _kinds(experts.values())
    after = {name: each for name, each in experts.items() if name.startswith(JOINT)}
    before = {name: each for name, each in experts.items() if name.startswith(PRETRAINED)}
    mixture = sources.models[MIXTURE]
    oracle = _heat_row(ORACLE, _oracle(mixture, kinds), kinds)
    beside = {name: sources.models[name] for name in (MIXTURE, UNIFORM) if name in sources.models}
    extra = [
        _heat_row(model_name(name), _common(each, kinds), kinds, is_mixture(name)) for name, each in beside.items()
    ]
    yield _heat(
        "Experts as joint training left them: accuracy in %, each attacked on its own", after, kinds, [*extra, oracle]
    )
    yield Paragraph(
        "Worst is over the attacks of this table, and empty for the mixture, which met more. Oracle routing counts an "
        "image made against the mixture as right if any of its experts is right about it: nobody attacked the oracle, "
        "so no gate can be expected to get there."
    )
    yield Folded("Experts as pre-training left them", (_heat("Pre-trained experts: accuracy in %", before, kinds),))


def _oracle(mixture: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Oracle routing under the attacks that experts met; withheld with the mixture, whose images it is about."""
    shares, withheld = mixture.get("oracle_routing", {}), mixture["accuracy"][WORST] is None
    return {kind: None if withheld and kind != CLEAN else shares[kind] for kind in kinds if kind in shares}


def _common(model: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The accuracies that experts have too; the worst case only if it is over the same attacks."""
    same = set(model["accuracy"]) == set(kinds)
    return {kind: share for kind, share in model["accuracy"].items() if kind in kinds and (same or kind != WORST)}


def _classes(mixture: Mapping[str, Any]) -> Table:
    rows = [
        row([name, interval(each[CLEAN]), interval(each[WORST]), str(each[CLEAN]["total"])])
        for name, each in mixture["per_class"].items()
    ]
    return table("Accuracy in % with 95 % Wilson intervals", ["class", "clean", "worst case", "images"], rows)


def gate(sources: Sources) -> Section:
    """Whom the gate trusts, clean and under attack."""
    title = "What the gate does"
    weights = sources.models.get(MIXTURE, {}).get("gate")
    if not weights:
        return Section("gate", title, missing("Gate weights", HOW))
    kinds = list(weights)
    experts = list(weights[CLEAN]["mean_weight"])
    blocks: list[Block] = [
        _gate_summary(weights, experts),
        _gate_table("Mean gate weight in %, clean and under each attack", weights, experts, kinds),
        Folded("Entropy of the weights, and how much of them each attack moves", (_gate_movement(weights),)),
    ]
    return Section("gate", title, tuple(blocks))


def _gate_summary(weights: Mapping[str, Any], experts: Sequence[str]) -> Paragraph:
    moved = max((each["shift"], kind) for kind, each in weights.items())
    first = max(experts, key=lambda name: weights[CLEAN]["mean_weight"][name])
    return Paragraph(
        f"On clean images the largest mean weight, {percent(weights[CLEAN]['mean_weight'][first])} %, goes to {first}; "
        f"an even split would be {percent(1 / len(experts))} %. The attack that moves the weights most, {moved[1]}, "
        f"shifts {percent(moved[0])} % of them from one expert to another, on average over images (total variation "
        "distance)."
    )


def _gate_movement(weights: Mapping[str, Any]) -> Table:
    return table(
        "How the gate behaves under each attack",
        ["attack", "entropy, nats", "weight moved, %"],
        [row([kind, f"{each['entropy']:.3f}", percent(each["shift"])]) for kind, each in weights.items()],
    )


def _gate_table(caption: str, weights: Mapping[str, Any], experts: Sequence[str], kinds: Sequence[str]) -> Table:
    largest = max(weight for each in weights.values() for weight in each["mean_weight"].values())

    def cell(kind: str, name: str) -> Cell:
        weight = weights[kind]["mean_weight"][name]
        return Cell(percent(weight), heat=weight / largest)

    return table(caption, ["expert", *kinds], [row([name, *(cell(kind, name) for kind in kinds)]) for name in experts])

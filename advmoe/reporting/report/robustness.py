"""The sections on accuracy against epsilon, accuracy by attack, and gate weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advmoe.core.settings import parse_epsilon
from advmoe.evaluation.summary import BASELINE, JOINT, MIXTURE, PRETRAINED, UNIFORM, WITHHELD, is_expert
from advmoe.reporting.report import glossary, overview
from advmoe.reporting.report.document import (
    Block,
    Cell,
    Details,
    Paragraph,
    Row,
    Section,
    Table,
    missing_results,
    row,
    table,
)
from advmoe.reporting.report.figures import Line, assign_colours, line_plot
from advmoe.reporting.report.formats import ABSENT, interval, is_mixture, model_name, percent, radius
from advmoe.reporting.report.sources import Sources, number
from advmoe.statistics.decisions import CLEAN, WORST

HINT = "`dvc repro evaluate` computes them"
ORACLE = "oracle routing (upper bound)"
EPSILON_AXIS = "L-inf epsilon, fraction of the pixel range"


def epsilon_section(sources: Sources) -> Section:
    """Accuracy against epsilon: on the fixed grid, and from the minimal perturbation of each image."""
    title = "Accuracy against epsilon"
    grid, minimal = sources.table("evaluate", "robustness"), sources.table("evaluate", "minimal-epsilon")
    if not (sources.models and grid):
        return Section("epsilon", title, missing_results("Accuracies against epsilon", HINT))
    return Section("epsilon", title, tuple(_curves(sources, grid, minimal)))


def _curves(sources: Sources, grid: list[dict[str, str]], minimal: list[dict[str, str]]) -> Iterable[Block]:
    # plot data includes withheld models
    names = [name for name in grid[0] if name in sources.printable]
    if not names:
        yield Paragraph("The robust accuracy of every model is withheld.")
        return
    known = [name if name == MIXTURE else BASELINE + name for name in sources.networks]
    series, mark = assign_colours(names, known), (float(sources.summary["epsilon"]), "threat model")
    yield line_plot(
        "robustness",
        "Accuracy under PGD against epsilon",
        _describe(grid, names),
        [_grid_line(sources, grid, name, series[name]) for name in names],
        axes_labels=(EPSILON_AXIS, "accuracy, %"),
        limits=(0, 101),
        mark=mark,
    )
    yield Details("Values of this figure", (_grid_table(sources, names),))
    models = [name for name in dict.fromkeys(each["model"] for each in minimal) if name in names]
    if models:
        yield line_plot(
            "minimal",
            "Accuracy against the minimal perturbation found",
            "Step curves that fall at the minimal adversarial epsilon found for each image. " + _medians(sources),
            [_steps(minimal, name, series[name]) for name in models],
            axes_labels=(EPSILON_AXIS, "accuracy, %"),
            limits=(0, 101),
            mark=mark,
        )
        yield Paragraph(
            f"{_medians(sources)} The first figure shows PGD at fixed epsilons. The second shows the minimal "
            "perturbation of every image found by FAB, and includes all attacks at the threat model's epsilon, where "
            "a curve may therefore drop. Both are upper bounds on the robust accuracy; the lower one is tighter."
        )


def _describe(grid: list[dict[str, str]], names: Sequence[str]) -> str:
    texts = (
        f"{model_name(name)}: "
        + ", ".join(f"{percent(float(each[name]))} % at {each['epsilon']}" for each in grid if each[name])
        for name in names
    )
    return "Accuracy under PGD against epsilon. " + "; ".join(texts) + "."


def _grid_line(sources: Sources, grid: list[dict[str, str]], name: str, series: int) -> Line:
    points = [(float(each["epsilon"]), number(each[name])) for each in grid]
    known = [(at, 100 * value) for at, value in points if value is not None]
    proportions = _grid(sources, name)
    bounds = None
    if all(at in proportions for at, _ in known):
        bounds = (
            tuple(100 * proportions[at]["low"] for at, _ in known),
            tuple(100 * proportions[at]["high"] for at, _ in known),
        )
    return Line(model_name(name), tuple(at for at, _ in known), tuple(value for _, value in known), series, bounds)


def _grid(sources: Sources, name: str) -> dict[float, dict[str, Any]]:
    """The accuracies of the grid with their intervals, by epsilon."""
    grid = sources.models.get(name, {}).get("grid", {})
    return {round(parse_epsilon(epsilon), 6): proportion for epsilon, proportion in grid.items()}


def _grid_table(sources: Sources, names: Sequence[str]) -> Table:
    grids = {name: _grid(sources, name) for name in names}
    radii = sorted({epsilon for grid in grids.values() for epsilon in grid})
    return table(
        "PGD accuracy in % with 95 % Wilson intervals",
        ["epsilon", *map(model_name, names)],
        [row([radius(at), *(_interval(grids[name], at) for name in names)]) for at in radii],
    )


def _interval(grid: Mapping[Any, Any], key: Any) -> str:
    return interval(grid[key]) if key in grid else ABSENT


def _steps(minimal: list[dict[str, str]], name: str, series: int) -> Line:
    mine = [each for each in minimal if each["model"] == name]
    xs = tuple(float(each["epsilon"]) for each in mine)
    return Line(model_name(name), xs, tuple(100 * float(each["accuracy"]) for each in mine), series, steps=True)


def _medians(sources: Sources) -> str:
    known = {name: each.get("median_minimal_epsilon") for name, each in sources.checked.items()}
    texts = [f"{model_name(name)} {value:.3f}" for name, value in known.items() if value is not None]
    return f"Median of the minimal epsilon found: {', '.join(texts)}." if texts else "No median is available."


def attacks_section(sources: Sources) -> Section:
    """Heat maps of model by attack and expert by attack, with oracle routing and the uniform average."""
    title = "Accuracy by attack"
    if not sources.models:
        return Section("attacks", title, missing_results("Accuracies by attack", HINT))
    blocks: list[Block] = [
        _heat_map(
            "Checked models: accuracy in %, clean, worst case and under each attack",
            sources.checked,
            _kinds(sources.checked.values()),
        ),
        *_fewer_images_note(sources.models[MIXTURE]),
        Details("Attacks and their settings", (_attack_settings(sources),)),
        Details("With 95 % intervals", (_intervals(sources.checked),)),
        *_experts(sources),
        Details("The mixture by class", (_classes(sources.models[MIXTURE]),)),
    ]
    return Section("attacks", title, tuple(blocks))


def _fewer_images_note(mixture: Mapping[str, Any]) -> Iterable[Block]:
    """The attacks that were run on fewer images than the test split has."""
    fewer = overview.attacks_on_fewer_images(mixture)
    if fewer:
        yield Paragraph(f"Attacks on fewer than the {mixture['accuracy'][CLEAN]['total']} test images: {fewer}.")


def _attack_settings(sources: Sources) -> Table:
    """The attacks with descriptions and settings."""
    attacks = {name: each["settings"] for model in sources.checked.values() for name, each in model["attacks"].items()}
    return table(
        "Attacks and their settings; step sizes are fractions of epsilon",
        ["attack", "description", "settings"],
        [
            row([name, glossary.ATTACKS.get(each["kind"], ABSENT), glossary.settings(each) or ABSENT])
            for name, each in attacks.items()
        ],
    )


def _heat_map(
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
    proportion = accuracy[kind]
    if proportion is None:
        return Cell(WITHHELD)
    return Cell(percent(proportion["accuracy"]), heat=proportion["accuracy"])


def _intervals(models: Mapping[str, Mapping[str, Any]]) -> Table:
    kinds = _kinds(models.values())
    rows = [row([kind, *(_interval(each["accuracy"], kind) for each in models.values())]) for kind in kinds]
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
    references = {name: sources.models[name] for name in (MIXTURE, UNIFORM) if name in sources.models}
    extra = [
        _heat_row(model_name(name), _common(each, kinds), kinds, is_mixture(name)) for name, each in references.items()
    ]
    yield _heat_map(
        "Experts after joint training: accuracy in %, each attacked separately", after, kinds, [*extra, oracle]
    )
    yield Paragraph(
        "Worst case: over the attacks of this table; empty for the mixture, on which more attacks were run. Oracle "
        "routing: an image attacked on the mixture counts as correct if any expert classifies it correctly. The "
        "attacks do not target the oracle, so this is an upper bound that no gate is expected to reach."
    )
    yield Details("Experts after pre-training", (_heat_map("Pre-trained experts: accuracy in %", before, kinds),))


def _oracle(mixture: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Oracle routing under the attacks on experts; withheld with the mixture, as it uses its adversarial images."""
    proportions, withheld = mixture.get("oracle_routing", {}), mixture["accuracy"][WORST] is None
    return {kind: None if withheld and kind != CLEAN else proportions[kind] for kind in kinds if kind in proportions}


def _common(model: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The accuracies under the attacks on experts; the worst case only if it is over the same attacks."""
    same_attacks = set(model["accuracy"]) == set(kinds)
    return {
        kind: proportion
        for kind, proportion in model["accuracy"].items()
        if kind in kinds and (same_attacks or kind != WORST)
    }


def _classes(mixture: Mapping[str, Any]) -> Table:
    rows = [
        row([name, interval(each[CLEAN]), interval(each[WORST]), str(each[CLEAN]["total"])])
        for name, each in mixture["per_class"].items()
    ]
    return table("Accuracy in % with 95 % Wilson intervals", ["class", "clean", "worst case", "images"], rows)


def gate_section(sources: Sources) -> Section:
    """The gate weights, clean and under attack."""
    title = "Gate weights"
    weights = sources.models.get(MIXTURE, {}).get("gate")
    if not weights:
        return Section("gate", title, missing_results("Gate weights", HINT))
    kinds = list(weights)
    experts = list(weights[CLEAN]["mean_weight"])
    blocks: list[Block] = [
        _gate_summary(weights, experts),
        _gate_table("Mean gate weight in %, clean and under each attack", weights, experts, kinds),
        Details("Entropy of the weights, and their change under each attack", (_gate_movement(weights),)),
    ]
    return Section("gate", title, tuple(blocks))


def _gate_summary(weights: Mapping[str, Any], experts: Sequence[str]) -> Paragraph:
    moved = max((each["shift"], kind) for kind, each in weights.items())
    first = max(experts, key=lambda name: weights[CLEAN]["mean_weight"][name])
    return Paragraph(
        f"On clean images the largest mean weight, {percent(weights[CLEAN]['mean_weight'][first])} %, goes to {first}; "
        f"uniform weights would be {percent(1 / len(experts))} %. The attack that changes the weights most is "
        f"{moved[1]}: {percent(moved[0])} % total variation distance, averaged over images."
    )


def _gate_movement(weights: Mapping[str, Any]) -> Table:
    return table(
        "Gate weights under each attack",
        ["attack", "entropy, nats", "change of weights, %"],
        [row([kind, f"{each['entropy']:.3f}", percent(each["shift"])]) for kind, each in weights.items()],
    )


def _gate_table(caption: str, weights: Mapping[str, Any], experts: Sequence[str], kinds: Sequence[str]) -> Table:
    largest = max(weight for each in weights.values() for weight in each["mean_weight"].values())

    def cell(kind: str, name: str) -> Cell:
        weight = weights[kind]["mean_weight"][name]
        return Cell(percent(weight), heat=weight / largest)

    return table(caption, ["expert", *kinds], [row([name, *(cell(kind, name) for kind in kinds)]) for name in experts])

"""How training went: curves on the validation split, the alarms that it raised, and what it cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from advmoe.core import paths
from advmoe.evaluation.summary import BASELINE, MIXTURE
from advmoe.reporting.report.document import Block, Folded, Paragraph, Section, missing, row, table
from advmoe.reporting.report.figures import Disc, Line, colours, discs, lines
from advmoe.reporting.report.formats import ABSENT, NOT_HERE, count, duration, is_mixture, large, memory, model_name
from advmoe.reporting.report.sources import TRAINING, Sources
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Share

MEASURED = ("clean", "fgsm", "pgd")
COST = {
    "parameters": "parameters",
    "flops_per_image": "FLOPs an image",
    "crafting_forward": "attacks, forward",
    "crafting_backward": "attacks, backward",
    "learning": "images learned from",
    "training_flops": "training FLOPs",
    "total_training_flops": "with all parts",
}
ACCOUNT = (
    "FLOPs an image: one forward pass, multiplications and additions counted apart. Attacks, forward and backward: "
    "images that went through the network to make training's attacks; images learned from: those of the optimiser's "
    "steps, with repeats. With all parts: the pre-training of the experts that a network is built from counts too. "
    "Time and memory are those of its own stage on the machine it ran on, without its parts."
)
WATCHED = (
    "All curves are on validation images, attacked by FGSM and by a short PGD: they watch training, and are no "
    "evidence of robustness. Mixtures start from experts that were trained before, so they have fewer epochs."
)
Rows = Sequence[Mapping[str, str]]


def curves(sources: Sources) -> Section:
    """Validation accuracy by epoch, of the mixture, the comparators and the experts; then the alarms."""
    title = "Training"
    found = [*_mixture(sources), *_group(sources, "baseline"), *_group(sources, "pretrain")]
    blocks = [*_alarms(sources), *([Paragraph(WATCHED)] if found else []), *found]
    return Section("training", title, tuple(blocks) or missing("Training", "`dvc repro` runs it"))


def _alarms(sources: Sources) -> Iterable[Block]:
    trained = {stage: sources.trained(stage) for stage in TRAINING}
    if not any(trained.values()):
        return
    raised = [
        f"{stage} {name}: {alarm}"
        for stage, networks in trained.items()
        for name, each in networks.items()
        for alarm in each.get("alarms", [])
    ]
    for alarm in raised:
        yield Paragraph(f"Alarm: {alarm}", loud=True)
    if not raised:
        yield Paragraph(
            f"No alarm was raised in training {sum(map(len, trained.values()))} networks: no gate collapsed or stopped "
            "learning, no network withstood one step and not several (catastrophic overfitting)."
        )


def _mixture(sources: Sources) -> Iterable[Block]:
    rows = sources.table("train", MIXTURE)
    if not rows:
        return
    yield lines(
        "training-mixture",
        "The mixture, accuracy on validation images",
        _ends("Accuracy of the mixture after each epoch of joint training.", {kind: (rows, kind) for kind in MEASURED}),
        [replace(_line(rows, kind, kind, 0), dash=place) for place, kind in enumerate(MEASURED)],
        axes_labels=("epoch", "accuracy, %"),
        limits=(0, 101),
    )
    loads = [name for name in rows[0] if name.startswith("load_")]
    yield lines(
        "training-gate",
        "Mean gate weight by epoch",
        _ends("Share of the gate's weight that each expert gets.", {name: (rows, name) for name in loads}),
        [_line(rows, name, name.removeprefix("load_"), place) for place, name in enumerate(loads, start=1)],
        axes_labels=("epoch", "mean weight, %"),
    )


def _group(sources: Sources, stage: str) -> Iterable[Block]:
    found = {name: sources.table(stage, name) for name in sources.trained(stage)}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return
    title = {"baseline": "The comparators", "pretrain": "The experts, before joint training"}[stage]
    known = sources.networks if stage == "baseline" else [MIXTURE]
    series = colours(list(found), known)
    yield lines(
        f"training-{stage}",
        f"{title}: PGD accuracy on validation images",
        _ends("Accuracy under PGD after each epoch.", {name: (rows, "pgd") for name, rows in found.items()}),
        [_line(rows, "pgd", name, series[name]) for name, rows in found.items()],
        axes_labels=("epoch", "accuracy, %"),
        limits=(0, 101),
    )


def _line(rows: Rows, column: str, label: str, series: int) -> Line:
    known = [(float(each["epoch"]), 100 * float(each[column])) for each in rows if each.get(column)]
    return Line(label, tuple(epoch for epoch, _ in known), tuple(value for _, value in known), series)


def _ends(sentence: str, columns: Mapping[str, tuple[Rows, str]]) -> str:
    last = (
        f"{label} {100 * float(rows[-1][column]):.1f} %"
        for label, (rows, column) in columns.items()
        if rows[-1].get(column)
    )
    return f"{sentence} At the end: {', '.join(last)}."


def cost(sources: Sources) -> Section:
    """What every network took to train and takes to use, and what the attacks took."""
    title = "What it costs"
    trained = [(stage, name, each) for stage in TRAINING for name, each in sources.trained(stage).items()]
    if not trained:
        return Section("cost", title, missing("Costs of training", "`dvc repro` trains the networks"))
    ours = [item for item in trained if item[0] != "pretrain"]
    experts = [item for item in trained if item[0] == "pretrain"]
    blocks: list[Block] = [
        *_worth(sources, ours),
        _costs(sources, "The mixture and its comparators", sorted(ours, key=lambda item: item[0] != "train")),
        Paragraph(ACCOUNT),
    ]
    if experts:
        blocks.append(Folded("The experts", (_costs(sources, "Pre-training of each expert", experts),)))
    if not any("cost" in each for _, _, each in trained):
        blocks.append(Paragraph("This record was written before networks kept account of their work."))
    if sources.judged:
        blocks.append(Folded("What the attacks cost", (_attacks(sources),)))
    return Section("cost", title, tuple(blocks), brief=True)


def _worth(sources: Sources, networks: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Iterable[Block]:
    """What the work of training has bought: robust against clean accuracy, where at least two networks can be drawn."""
    known = [name if name == MIXTURE else BASELINE + name for name in sources.networks]
    series = colours(known, known)
    rows = []
    for stage, name, metrics in networks:
        model = MIXTURE if stage == "train" else BASELINE + name
        if model not in sources.printable or "cost" not in metrics:
            continue
        accuracy = sources.printable[model]["accuracy"]
        clean, worst = (Share(**accuracy[kind]) for kind in (CLEAN, WORST))
        rows.append(Disc(model_name(model), clean, worst, metrics["cost"]["total_training_flops"], series[model]))
    if len(rows) > 1:
        yield discs(
            "worth",
            "Robust against clean accuracy, and what training took",
            "Accuracy clean and in the worst case of all attacks, in %, with 95 % intervals; area: operations of "
            "training, experts included.",
            sorted(rows, key=lambda row: row.series),
            axes_labels=("clean accuracy, %", "robust accuracy (worst case), %"),
            unit="FLOP",
        )


def _costs(sources: Sources, caption: str, networks: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Block:
    rows = []
    for stage, name, metrics in networks:
        spent, ran = metrics.get("cost", {}), sources.circumstances(stage, name)
        rows.append(
            row(
                [
                    name,
                    *(large(spent[key]) if key in spent else ABSENT for key in COST),
                    duration(ran["seconds"]) if "seconds" in ran else NOT_HERE,
                    memory(ran["peak_memory"]) if "peak_memory" in ran else NOT_HERE,
                ],
                emphasis=stage == "train" and is_mixture(name),
            )
        )
    return table(caption, ["network", *COST.values(), "time", "peak memory"], rows)


def _attacks(sources: Sources) -> Block:
    ran = read_timings(sources)
    rows = [
        row(
            [
                model_name(name),
                attack,
                count(spent["attacked"]),
                count(spent["forward"]),
                count(spent["backward"]),
                _time(ran, name, attack),
            ]
        )
        for name, each in sources.judged.items()
        for attack, spent in each["attacks"].items()
    ]
    columns = ["model", "attack", "images attacked", "forward", "backward", "time"]
    return table("Passes of images through the model, counted by the harness", columns, rows)


def read_timings(sources: Sources) -> Mapping[str, float]:
    """Seconds of every attack on every model, as far as this record knows."""
    found: Mapping[str, float] = sources.circumstances("evaluate", paths.ADVERSARIAL.stem).get("timings", {})
    return found


def _time(timings: Mapping[str, float], model: str, attack: str) -> str:
    key = f"{model}.{attack}"
    return duration(timings[key]) if key in timings else NOT_HERE

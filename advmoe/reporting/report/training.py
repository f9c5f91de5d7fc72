"""The sections on training curves, training alarms and cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from advmoe.core import paths
from advmoe.evaluation.summary import BASELINE, MIXTURE
from advmoe.reporting.report.document import Block, Details, Paragraph, Section, missing_results, row, table
from advmoe.reporting.report.figures import Bubble, Line, assign_colours, bubble_chart, line_plot
from advmoe.reporting.report.formats import (
    ABSENT,
    NOT_RECORDED,
    count,
    duration,
    is_mixture,
    large_number,
    memory,
    model_name,
)
from advmoe.reporting.report.sources import TRAINING, Sources
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Proportion

COLUMNS = ("clean", "fgsm", "pgd")
COST = {
    "parameters": "parameters",
    "flops_per_image": "FLOPs per image",
    "crafting_forward": "attacks, forward",
    "crafting_backward": "attacks, backward",
    "learning": "training images",
    "training_flops": "training FLOPs",
    "total_training_flops": "including experts",
}
COST_NOTE = (
    "FLOPs per image: one forward pass, multiplications and additions counted separately. Attacks, forward and "
    "backward: images passed through the network by the attacks of training; training images: those of the optimiser "
    "steps, with repetitions. Including experts: with the pre-training of the experts that a network consists of. Time "
    "and memory: of the stage of this network only, on the machine it ran on."
)
VALIDATION_NOTE = (
    "All curves are on validation images, under FGSM and a short PGD: they monitor training and are not a robustness "
    "evaluation. Mixtures start from pre-trained experts and are trained for fewer epochs."
)
Rows = Sequence[Mapping[str, str]]


def training_section(sources: Sources) -> Section:
    """The alarms, then the validation accuracy by epoch of mixture, baselines and experts."""
    title = "Training"
    curves = [*_mixture_curves(sources), *_network_curves(sources, "baseline"), *_network_curves(sources, "pretrain")]
    blocks = [*_alarms(sources), *([Paragraph(VALIDATION_NOTE)] if curves else []), *curves]
    return Section("training", title, tuple(blocks) or missing_results("Training", "`dvc repro` runs it"))


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
        yield Paragraph(f"Alarm: {alarm}", alert=True)
    if not raised:
        yield Paragraph(
            f"No alarms in the training of {sum(map(len, trained.values()))} networks: no collapsed or constant gate, "
            "no catastrophic overfitting (robust to one step, not to several)."
        )


def _mixture_curves(sources: Sources) -> Iterable[Block]:
    rows = sources.table("train", MIXTURE)
    if not rows:
        return
    yield line_plot(
        "training-mixture",
        "Mixture: accuracy on validation images",
        _final_values(
            "Accuracy of the mixture after each epoch of joint training.", {kind: (rows, kind) for kind in COLUMNS}
        ),
        [replace(_line(rows, kind, kind, 0), dash=index) for index, kind in enumerate(COLUMNS)],
        axes_labels=("epoch", "accuracy, %"),
        limits=(0, 101),
    )
    loads = [name for name in rows[0] if name.startswith("load_")]
    yield line_plot(
        "training-gate",
        "Mean gate weight by epoch",
        _final_values("Mean gate weight of each expert.", {name: (rows, name) for name in loads}),
        [_line(rows, name, name.removeprefix("load_"), index) for index, name in enumerate(loads, start=1)],
        axes_labels=("epoch", "mean weight, %"),
    )


def _network_curves(sources: Sources, stage: str) -> Iterable[Block]:
    tables = {name: sources.table(stage, name) for name in sources.trained(stage)}
    tables = {name: rows for name, rows in tables.items() if rows}
    if not tables:
        return
    title = {"baseline": "Baselines", "pretrain": "Experts, before joint training"}[stage]
    known = sources.networks if stage == "baseline" else [MIXTURE]
    series = assign_colours(list(tables), known)
    yield line_plot(
        f"training-{stage}",
        f"{title}: PGD accuracy on validation images",
        _final_values("Accuracy under PGD after each epoch.", {name: (rows, "pgd") for name, rows in tables.items()}),
        [_line(rows, "pgd", name, series[name]) for name, rows in tables.items()],
        axes_labels=("epoch", "accuracy, %"),
        limits=(0, 101),
    )


def _line(rows: Rows, column: str, label: str, series: int) -> Line:
    known = [(float(each["epoch"]), 100 * float(each[column])) for each in rows if each.get(column)]
    return Line(label, tuple(epoch for epoch, _ in known), tuple(value for _, value in known), series)


def _final_values(sentence: str, columns: Mapping[str, tuple[Rows, str]]) -> str:
    last = (
        f"{label} {100 * float(rows[-1][column]):.1f} %"
        for label, (rows, column) in columns.items()
        if rows[-1].get(column)
    )
    return f"{sentence} Last epoch: {', '.join(last)}."


def cost_section(sources: Sources) -> Section:
    """The cost of training and inference of every network, and of the attacks."""
    title = "Cost"
    trained = [(stage, name, each) for stage in TRAINING for name, each in sources.trained(stage).items()]
    if not trained:
        return Section("cost", title, missing_results("Cost", "`dvc repro` trains the networks"))
    networks = [item for item in trained if item[0] != "pretrain"]
    experts = [item for item in trained if item[0] == "pretrain"]
    blocks: list[Block] = [
        *_cost_figure(sources, networks),
        _cost_table(sources, "Mixture and baselines", sorted(networks, key=lambda item: item[0] != "train")),
        Paragraph(COST_NOTE),
    ]
    if experts:
        blocks.append(Details("Experts", (_cost_table(sources, "Pre-training of each expert", experts),)))
    if not any("cost" in each for _, _, each in trained):
        blocks.append(Paragraph("No costs were recorded by this version of the pipeline."))
    if sources.checked:
        blocks.append(Details("Cost of the attacks", (_attack_cost_table(sources),)))
    return Section("cost", title, tuple(blocks), in_markdown=True)


def _cost_figure(sources: Sources, networks: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Iterable[Block]:
    """Robust against clean accuracy with the training FLOPs, if at least two networks have both."""
    known = [name if name == MIXTURE else BASELINE + name for name in sources.networks]
    series = assign_colours(known, known)
    rows = []
    for stage, name, metrics in networks:
        model = MIXTURE if stage == "train" else BASELINE + name
        if model not in sources.printable or "cost" not in metrics:
            continue
        accuracy = sources.printable[model]["accuracy"]
        clean, worst = (Proportion(**accuracy[kind]) for kind in (CLEAN, WORST))
        rows.append(Bubble(model_name(model), clean, worst, metrics["cost"]["total_training_flops"], series[model]))
    if len(rows) > 1:
        yield bubble_chart(
            "cost-figure",
            "Robust accuracy, clean accuracy and training FLOPs",
            "Clean and worst-case accuracy in %, with 95 % intervals; area: training FLOPs, including experts.",
            sorted(rows, key=lambda row: row.series),
            axes_labels=("clean accuracy, %", "robust accuracy (worst case), %"),
            unit="FLOP",
        )


def _cost_table(sources: Sources, caption: str, networks: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Block:
    rows = []
    for stage, name, metrics in networks:
        cost, info = metrics.get("cost", {}), sources.run_info(stage, name)
        rows.append(
            row(
                [
                    name,
                    *(large_number(cost[key]) if key in cost else ABSENT for key in COST),
                    duration(info["seconds"]) if "seconds" in info else NOT_RECORDED,
                    memory(info["peak_memory"]) if "peak_memory" in info else NOT_RECORDED,
                ],
                emphasis=stage == "train" and is_mixture(name),
            )
        )
    return table(caption, ["network", *COST.values(), "time", "peak memory"], rows)


def _attack_cost_table(sources: Sources) -> Block:
    timings = read_timings(sources)
    rows = [
        row(
            [
                model_name(name),
                attack,
                count(passes["attacked"]),
                count(passes["forward"]),
                count(passes["backward"]),
                _time(timings, name, attack),
            ]
        )
        for name, each in sources.checked.items()
        for attack, passes in each["attacks"].items()
    ]
    columns = ["model", "attack", "images attacked", "forward", "backward", "time"]
    return table("Forward and backward passes of images, counted by the evaluation", columns, rows)


def read_timings(sources: Sources) -> Mapping[str, float]:
    """Returns the seconds of every attack on every model, as far as they were recorded."""
    timings: Mapping[str, float] = sources.run_info("evaluate", paths.ADVERSARIAL.stem).get("timings", {})
    return timings


def _time(timings: Mapping[str, float], model: str, attack: str) -> str:
    key = f"{model}.{attack}"
    return duration(timings[key]) if key in timings else NOT_RECORDED

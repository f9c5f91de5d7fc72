"""How fast are our attacks and our training? `make bench` runs this in a virtual environment of its own.

- dense PGD against torchattacks, foolbox and the adversarial-robustness-toolbox: same network, images and settings;
- the standard AutoAttack against its authors' implementation;
- a step of joint adversarial training against a plain loop;
- achieved floating-point operations against the matmul rate of this machine;
- a mixture's gradient with the experts side by side, where the engine runs them so, against one after another;
- what an attack's step costs, by number of experts, width, image size and steps.

All cases of a comparison are run in turn, in one process; a ratio is the median over rounds [lowest to highest]. Robust
accuracies stand beside every ratio: being fast by attacking less is no art. The numbers go to a JSON file, and to a
Markdown file beside it.

Shapes: N images, B batch, C channel, H/W pixels.
"""

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks import engine, presets, registry
from advmoe.attacks.ball import LInf
from advmoe.attacks.interface import Model, input_gradient
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import ImageDraws
from advmoe.core import console, files, paths
from advmoe.evaluation import harness
from advmoe.evaluation.harness import DECISION_BATCH, EvaluationConfig, EvaluationTarget
from advmoe.models import inference
from advmoe.models.layers import folded
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import machine
from benchmarks import checkpoints, joint, networks, peers
from benchmarks.networks import Subject
from benchmarks.peers import Climb
from benchmarks.timing import Ratio, Timed, interleaved, ratio

SEED = 0
STEP_SIZE = 0.25  # of epsilon
PRECISIONS: tuple[inference.Precision, ...] = ("bfloat16", "float32")
MATMUL_SIDES = (512, 1024, 2048)  # the matmul rate is that of the best of them
SIZES: Mapping[str, tuple[int, ...]] = {"experts": (1, 3, 9), "width": (8, 16, 32, 64), "side": (8, 16, 32)}
PACKAGES = ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "pyautoattack")

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds, images and steps of dense PGD, batch, images of AutoAttack, images of a gradient at
    full width.
    """

    rounds: int
    images: int
    steps: int
    batch_size: int
    suite: int
    wide: int


FULL = Effort(rounds=3, images=240, steps=10, batch_size=120, suite=50, wide=16)
QUICK = Effort(rounds=2, images=60, steps=4, batch_size=60, suite=4, wide=4)


@dataclass(frozen=True)
class Table:
    """Rows that share their columns."""

    title: str
    rows: list[Row]

    def cells(self) -> list[list[str]]:
        """For people."""
        return [[_cell(value) for value in row.values()] for row in self.rows]

    def markdown(self) -> str:
        """To be pasted into a page."""
        columns = list(self.rows[0])
        rule = ["---", *["---:"] * (len(columns) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *self.cells())]
        return "\n".join((f"**{self.title}**", "", *lines, ""))


def main() -> None:
    """Measure, print, write."""
    on_gpu = f"On a GPU: {', '.join(WALL_CLOCK)}; the others count CPU seconds."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=on_gpu, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and rounds")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this part; may be repeated")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file; default: a new one under runs/")
    arguments = parser.parse_args()
    if not checkpoints.available():
        parser.exit(2, f"error: {checkpoints.FOLDER} is not there; BENCH_DATA=folder names another place\n")
    machine.prepare_torch()
    there = SECTIONS if machine.device().type == "cpu" else WALL_CLOCK
    sections = arguments.only or there
    if not set(sections) <= set(there):
        parser.exit(2, f"error: {on_gpu}\n")
    logging.getLogger("art").setLevel(logging.WARNING)
    effort = QUICK if arguments.quick else FULL
    console.say(_machine_line())
    tables = []
    for name in sections:
        for table in SECTIONS[name](effort):
            console.table(table.title, list(table.rows[0]), table.cells())
            tables.append(table)
    _write(arguments.out or paths.RUNS / f"speed-{datetime.now(UTC):%Y%m%d-%H%M%S}.json", effort, tables)


# ---- dense PGD


def dense_pgd(effort: Effort) -> Iterator[Table]:
    """Every image, every step; beside it what the pipeline does, which leaves an image at its first success."""
    yield Table(
        "PGD against other libraries", [row for subject in _subjects(effort) for row in _pgd_rows(subject, effort)]
    )


def _subjects(effort: Effort) -> list[Subject]:
    small = [networks.checkpoint(name, effort.images) for name in checkpoints.CHECKPOINTS]
    return [*small, *_mixtures(effort)]


def _mixtures(effort: Effort) -> list[Subject]:
    """Nine experts at the two sizes that the pipeline trains on two cores, at its epsilons."""
    return [_digits_mixture(effort), _photographs_mixture(effort)]


def _digits_mixture(effort: Effort) -> Subject:
    images, labels = _here(networks.labelled_digits(effort.images))
    return networks.mixture_subject("mixture 9 x width 16, 8 px", images, labels, width=16, epsilon=0.1)


def _photographs_mixture(effort: Effort) -> Subject:
    images, labels = _here(networks.labelled_photographs(effort.images // 12))
    return networks.mixture_subject("mixture 9 x width 16, 32 px", images, labels, width=16, epsilon=8 / 255)


def _pgd_rows(subject: Subject, effort: Effort) -> list[Row]:
    climb = Climb(subject.epsilon, effort.steps, STEP_SIZE, effort.batch_size)
    cases = _our_pgd(subject, climb) | _their_pgd(subject, climb)
    timed = interleaved(cases, effort.rounds)
    ours = timed["ours, dense"]
    correct = {name: _standing(subject, case.result) for name, case in timed.items()}
    return [
        {
            "network": subject.name,
            "attack": name,
            "robust %": _percent(correct[name]),
            "as plain float32 %": _percent(correct[name] == correct["plain loop, float32"]),
            **_times(case),
            **_ratios(case, ours),
        }
        for name, case in timed.items()
    ]


def _our_pgd(subject: Subject, climb: Climb) -> dict[str, Callable[[], Tensor]]:
    """Four of them: as training crafts, the same in float32, the same without any of the engine, and as evaluated."""
    model, images, labels = subject.model, subject.images, subject.labels
    settings = Pgd(kind="pgd", steps=climb.steps, step_size=climb.step_size, restarts=1, loss="ce", targets=0)
    craft, ball = registry.bind(settings, {}), LInf(climb.epsilon)
    terms: dict[str, Any] = {"ball": ball, "seed": SEED, "purpose": "pgd", "batch_size": climb.batch_size}
    standing = torch.ones_like(labels, dtype=torch.bool)
    bare = networks.as_documented(model)

    def plain() -> Tensor:
        rows = torch.split(torch.arange(len(labels)), climb.batch_size)
        each = [ImageDraws(SEED, "pgd", row) for row in rows]
        return torch.cat(
            [
                craft(bare, images[row], labels[row], ball=ball, draws=draws)
                for row, draws in zip(rows, each, strict=True)
            ]
        )

    return {
        "ours, dense": partial(
            engine.attack_without_early_stop, model, images, labels, craft, precision="bfloat16", **terms
        ),
        "ours, dense, float32": partial(
            engine.attack_without_early_stop, model, images, labels, craft, precision="float32", **terms
        ),
        "ours, the fallen dropped": partial(
            engine.attack_dataset, model, images, labels, standing, craft, precision="bfloat16", **terms
        ),
        "plain loop, float32": plain,
    }


def _their_pgd(subject: Subject, climb: Climb) -> dict[str, Callable[[], Tensor]]:
    """Each library on the network as documented, and the leanest of them on ours, weights in channels_last."""
    documented = networks.as_documented(subject.model)
    cases: dict[str, Callable[[], Tensor]] = {
        name: partial(attack, documented, subject.images, subject.labels, climb) for name, attack in peers.PGD.items()
    }
    lean = partial(peers.torchattacks_pgd, subject.model, subject.images, subject.labels, climb)
    return cases | {"torchattacks, channels_last": lean}


# ---- AutoAttack


def autoattack(effort: Effort) -> Iterator[Table]:
    """The whole suite. Minutes for each network, so one round, and no warming up."""
    subjects = [networks.checkpoint(name, effort.suite) for name in checkpoints.CHECKPOINTS]
    subjects.append(_digits_mixture(effort).first(effort.suite))
    yield Table("standard AutoAttack", [_suite_row(subject, effort.batch_size) for subject in subjects])


def _suite_row(subject: Subject, batch_size: int) -> Row:
    documented = networks.as_documented(subject.model)
    theirs = partial(
        peers.reference_autoattack, documented, subject.images, subject.labels, epsilon=subject.epsilon,
        batch_size=batch_size, seed=SEED,
    )  # fmt: skip
    timed = interleaved({"ours": partial(_our_suite, subject, batch_size), "reference": theirs}, 1, warm=False)
    ours, reference = timed["ours"], timed["reference"]
    mine, its = (_standing(subject, case.result) for case in (ours, reference))
    return {
        "network": subject.name,
        "images": len(subject.labels),
        "ours: robust %": _percent(mine),
        "reference: robust %": _percent(its),
        "alike %": _percent(mine == its),
        "ours: CPU s": ours.median("cpu"),
        "reference: CPU s": reference.median("cpu"),
        **_ratios(reference, ours),
    }


def _our_suite(subject: Subject, batch_size: int) -> Tensor:
    """Adversarial images (N, C, H, W), the last that was found of each."""
    target = EvaluationTarget(subject.name, subject.model, subject.images, subject.labels)
    attacks = presets.preset("autoattack", (), has_gate=False)
    terms = EvaluationConfig(
        LInf(subject.epsilon), machine.evaluation_seed(SEED), "bfloat16", batch_size, drop_fallen=True
    )
    outcomes = harness.evaluate(target, attacks, terms).outcomes.values()
    harness.clear_resume_state(target, attacks, terms)
    found = subject.images.clone()
    for outcome in outcomes:
        fallen = outcome.attacked & ~outcome.correct
        found[fallen] = outcome.images[fallen]
    return found


# ---- joint training


def training_step(effort: Effort) -> Iterator[Table]:
    """PGD of ten steps through the whole mixture, then a step of SGD; both losses follow the same random numbers."""
    rows = []
    sizes = _here((networks.digits(64), networks.photographs(16)))
    for side, images in zip((8, 32), sizes, strict=True):
        model = networks.settled(networks.mixture(images, width=16), images)
        assert isinstance(model, MixtureOfExperts)
        rows += _step_rows(f"mixture 9 x width 16, {side} px", model, images, effort.rounds)
    yield Table("a step of joint training", rows)


def _step_rows(name: str, model: MixtureOfExperts, images: Tensor, rounds: int) -> list[Row]:
    labels = torch.arange(len(images), device=images.device) % len(networks.CLASS_NAMES)
    cases: dict[str, Callable[[], float]] = {
        f"ours, {precision}": joint.our_step(model, images, labels, precision) for precision in PRECISIONS
    }
    cases["plain loop, float32"] = joint.plain_step(model, images, labels)
    timed = interleaved(cases, rounds)
    ours = timed[f"ours, {PRECISIONS[0]}"]
    return [
        {"network": name, "images": len(images), "step": step, "loss at the end": case.result}
        | _times(case)
        | _ratios(case, ours)
        for step, case in timed.items()
    ]


# ---- floating-point operations


def operations(effort: Effort) -> Iterator[Table]:
    """Forwards and back to the pixels, in billions of operations a second, beside the best matmul of this machine."""
    rows: list[Row] = []
    for width, images in (
        (64, networks.photographs(effort.wide)),
        (16, networks.photographs(4 * effort.wide)),
        (16, networks.digits(effort.batch_size)),
    ):
        name = f"mixture 9 x width {width}, {images.shape[3]} px"
        rows += _operation_rows(name, networks.mixture(images, width=width), images, effort.rounds)
    yield Table("operations of a gradient", rows)


def _operation_rows(name: str, model: nn.Module, images: Tensor, rounds: int) -> Iterator[Row]:
    flops = len(images) * networks.gradient_flops(model, images[0])
    for precision in PRECISIONS:
        matmuls = {f"matmul {side}": _matmul(side, precision) for side in MATMUL_SIDES}
        with _gradients({"gradient": (model, images)}, precision) as gradient:
            timed = interleaved(gradient | matmuls, rounds)
        peak = max(2 * side**3 / timed[f"matmul {side}"].median("cpu") for side in MATMUL_SIDES)
        reached = flops / timed["gradient"].median("cpu")
        yield {
            "network": name,
            "images": len(images),
            "precision": precision,
            "GFLOP": flops / 1e9,
            "GFLOP/CPU s": reached / 1e9,
            "GFLOP/s": flops / timed["gradient"].median("wall") / 1e9,
            "matmul GFLOP/CPU s": peak / 1e9,
            "share of matmul %": 100 * reached / peak,
        }


@contextmanager
def _gradients(
    pairs: Mapping[str, tuple[nn.Module, Tensor]], precision: inference.Precision
) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """A gradient of each (network, images), the networks made ready before, as for all steps of an attack."""
    with ExitStack() as stack:
        yield {
            name: partial(_gradient, stack.enter_context(engine.attack_mode(model, precision)), images)
            for name, (model, images) in pairs.items()
        }


def _gradient(model: Model, images: Tensor) -> Tensor:
    return input_gradient(model, images, torch.zeros(len(images), dtype=torch.long), "ce")[0]


def _matmul(side: int, precision: inference.Precision) -> Callable[[], Tensor]:
    left, right = (torch.randn(side, side).to(inference.DTYPES[precision]) for _ in range(2))
    return lambda: left @ right


# ---- experts side by side


def experts_side_by_side(effort: Effort) -> Iterator[Table]:
    """A gradient of the mixture as the engine takes it, beside one expert after another."""
    cases = [(4, networks.digits(effort.batch_size)), (16, networks.photographs(4)), (64, networks.photographs(4))]
    cases += [(16, networks.digits(count)) for count in (4, 64, effort.batch_size)]
    yield Table("experts side by side", [row for width, images in cases for row in _expert_rows(width, images, effort)])


def _expert_rows(width: int, images: Tensor, effort: Effort) -> Iterator[Row]:
    model = networks.mixture(images, width=width)
    for precision in PRECISIONS:
        with _in_turn(model, precision) as plain, _gradients({"engine": (model, images)}, precision) as engines:
            timed = interleaved(engines | {"in turn": partial(_gradient, plain, images)}, effort.rounds)
        yield {
            "network": f"mixture 9 x width {width}, {images.shape[3]} px",
            "images": len(images),
            "precision": precision,
            "in turn: CPU s": timed["in turn"].median("cpu"),
            "engine: CPU s": timed["engine"].median("cpu"),
            "ratio, CPU": ratio(timed["in turn"], timed["engine"], "cpu"),
        }


@contextmanager
def _in_turn(model: MixtureOfExperts, precision: inference.Precision) -> Iterator[Model]:
    """The engine's form of a copy, but for the experts, which run one after another."""
    copied = copy.deepcopy(model)
    with inference.eval_mode(copied), folded(copied):
        yield engine.FrozenModel(copied, precision, engine.PassCount())


# ---- what an attack's step costs


def scaling(effort: Effort) -> Iterator[Table]:
    """By the number of experts, against as many lone experts; by width and image size; by steps."""
    yield Table("cost by number of experts, bfloat16, width 16, 8 px", _by_experts(effort))
    yield Table("cost by width, bfloat16, a lone expert, 32 px", _by_width(effort))
    yield Table("cost by image size, bfloat16, a lone expert of width 16", _by_side(effort))
    yield Table("cost by steps of dense PGD, bfloat16, a lone expert of width 16, 8 px", _by_steps(effort))


def _by_experts(effort: Effort) -> list[Row]:
    images = networks.digits(effort.batch_size)
    models: dict[str, nn.Module] = {
        str(count): networks.mixture(images, width=16, experts=count) for count in SIZES["experts"]
    }
    parts = {"lone": networks.lone_expert(images, width=16), "gate": models["1"].get_submodule("gate")}
    pairs = {name: (model, images) for name, model in (models | parts).items()}
    with _gradients(pairs, "bfloat16") as cases:
        timed = interleaved(cases, effort.rounds)
    alone, gate = timed["lone"].median("cpu"), timed["gate"].median("cpu")
    return [
        {"experts": int(count)}
        | _times(timed[count])
        | {"over a gate and so many lone experts": timed[count].median("cpu") / (gate + int(count) * alone)}
        for count in models
    ]


def _by_width(effort: Effort) -> list[Row]:
    images = networks.photographs(effort.wide)
    models = {str(width): networks.lone_expert(images, width=width) for width in SIZES["width"]}
    return _cost_rows("width", {name: (model, images) for name, model in models.items()}, effort.rounds)


def _by_side(effort: Effort) -> list[Row]:
    images = {str(side): networks.photographs(effort.wide, side) for side in SIZES["side"]}
    pairs = {side: (networks.lone_expert(of_side, width=16), of_side) for side, of_side in images.items()}
    return _cost_rows("side", pairs, effort.rounds)


def _cost_rows(what: str, pairs: Mapping[str, tuple[nn.Module, Tensor]], rounds: int) -> list[Row]:
    with _gradients(pairs, "bfloat16") as cases:
        timed = interleaved(cases, rounds)
    work = {name: len(images) * networks.gradient_flops(model, images[0]) for name, (model, images) in pairs.items()}
    return [
        {what: int(name), "images": len(pairs[name][1]), "GFLOP": work[name] / 1e9}
        | _times(case)
        | {"GFLOP/CPU s": work[name] / case.median("cpu") / 1e9}
        for name, case in timed.items()
    ]


def _by_steps(effort: Effort) -> list[Row]:
    images = networks.digits(effort.batch_size)
    subject = networks.Subject(
        "expert", networks.lone_expert(images, width=16), images, torch.arange(len(images)) % 10, 0.1
    )
    counts = (effort.steps, 2 * effort.steps, 4 * effort.steps)
    climbs = {steps: Climb(subject.epsilon, steps, STEP_SIZE, effort.batch_size) for steps in counts}
    timed = interleaved(
        {str(steps): _our_pgd(subject, climb)["ours, dense"] for steps, climb in climbs.items()}, effort.rounds
    )
    return [
        {"steps": steps} | _times(timed[str(steps)]) | {"CPU ms a step": 1000 * timed[str(steps)].median("cpu") / steps}
        for steps in climbs
    ]


SECTIONS: Mapping[str, Callable[[Effort], Iterator[Table]]] = {
    "pgd": dense_pgd,
    "autoattack": autoattack,
    "training": training_step,
    "operations": operations,
    "experts": experts_side_by_side,
    "scaling": scaling,
}
WALL_CLOCK = ("pgd", "autoattack", "training")  # sections whose rows have both clocks


# ---- rows, and where they go


def _here(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same on the device that computes."""
    return tuple(each.to(machine.device()) for each in tensors)


def _standing(subject: Subject, found_NCHW: Tensor) -> Tensor:
    """Who is right on these images by a float32 forward pass, once they are back in the ball; (N,) bool."""
    inside = LInf(subject.epsilon).project(found_NCHW, subject.images)
    correct_N: Tensor = (
        inference.predict(subject.model, inside, min(len(inside), DECISION_BATCH)).argmax(1) == subject.labels
    )
    return correct_N


def _percent(verdicts_N: Tensor) -> float:
    return 100 * float(verdicts_N.float().mean())


def _times(case: Timed[Any]) -> Row:
    return {"CPU s": case.median("cpu"), "wall s": case.median("wall")}


def _ratios(case: Timed[Any], ours: Timed[Any]) -> Row:
    return {"times ours, CPU": ratio(case, ours, "cpu"), "times ours, wall": ratio(case, ours, "wall")}


def _cell(value: object) -> str:
    """Three digits of a number; a count stays whole."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _machine_line() -> str:
    place, threads = machine.device(), torch.get_num_threads()
    gpu = f"{torch.cuda.get_device_name(place)}, " if place.type == "cuda" else ""
    return f"{gpu}{_processor()}, {threads} of {machine.usable_cores()} cores, torch {version('torch')}"


def _processor() -> str:
    """What Linux calls it; elsewhere what Python knows."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else dict(machine.describe())["device"]


def _write(path: Path, effort: Effort, tables: Sequence[Table]) -> None:
    """JSON, and Markdown beside it."""
    about = {
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "machine": _machine_line(),
        "packages": {package: version(package) for package in PACKAGES},
        "effort": asdict(effort),
    }
    rows = {
        table.title: [{name: _plain(value) for name, value in row.items()} for row in table.rows] for table in tables
    }
    files.write_json(path, about | {"tables": rows})
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())  # type: ignore[attr-defined]
    head = f"`{about['command']}` on {about['machine']}; {packages}.\n"
    files.write_text(path.with_suffix(".md"), "\n".join([head, *(table.markdown() for table in tables)]))
    console.say(f"written to {path}, with the same as Markdown beside it")


def _plain(value: object) -> Any:
    return asdict(value) if isinstance(value, Ratio) else value


if __name__ == "__main__":
    main()

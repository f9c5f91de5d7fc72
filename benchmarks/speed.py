"""Speed of attacks and training. `make bench` runs this in a virtual environment of its own.

- dense PGD against torchattacks, foolbox and the adversarial-robustness-toolbox: same network, images and settings;
- the standard AutoAttack against its authors' implementation;
- a step of joint adversarial training against a plain loop;
- floating-point operations per second against the matmul rate of this machine;
- a mixture's gradient with grouped experts, where the engine groups them, against one expert after another;
- the cost of an attack step by number of experts, width, image size and steps.

All cases of a comparison are interleaved in one process; a ratio is the median over rounds [minimum to maximum]. Robust
accuracy is reported with the ratios, as a weaker attack would be faster. Results are written as JSON and as Markdown.

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
from advmoe.attacks.random_streams import ImageStreams
from advmoe.core import console, files, paths
from advmoe.evaluation import harness
from advmoe.evaluation.harness import DECISION_BATCH, EvaluationConfig, EvaluationTarget
from advmoe.models import inference
from advmoe.models.layers import fold_batchnorm
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import machine
from benchmarks import checkpoints, joint, libraries, networks
from benchmarks.libraries import PgdConfig
from benchmarks.networks import BenchmarkTarget
from benchmarks.timing import Ratio, Timed, ratio, time_interleaved

SEED = 0
STEP_SIZE = 0.25  # of epsilon
PRECISIONS: tuple[inference.Precision, ...] = ("bfloat16", "float32")
MATMUL_SIDES = (512, 1024, 2048)  # the matmul rate is the best over these sizes
SIZES: Mapping[str, tuple[int, ...]] = {"experts": (1, 3, 9), "width": (8, 16, 32, 64), "side": (8, 16, 32)}
PACKAGES = ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "pyautoattack")

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Sizes of the measurements. `images`, `steps`: of dense PGD; `suite`: images of AutoAttack; `wide`: images of a
    gradient at full width.
    """

    rounds: int
    images: int
    steps: int
    batch_size: int
    suite: int
    wide: int


FULL = Workload(rounds=3, images=240, steps=10, batch_size=120, suite=50, wide=16)
QUICK = Workload(rounds=2, images=60, steps=4, batch_size=60, suite=4, wide=4)


@dataclass(frozen=True)
class Table:
    """A table whose rows have the same columns."""

    title: str
    rows: list[Row]

    def cells(self) -> list[list[str]]:
        """Returns the rows as formatted cells."""
        return [[_cell(value) for value in row.values()] for row in self.rows]

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        columns = list(self.rows[0])
        rule = ["---", *["---:"] * (len(columns) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *self.cells())]
        return "\n".join((f"**{self.title}**", "", *lines, ""))


def main() -> None:
    """Measures, prints and writes the tables."""
    on_gpu = f"On a GPU only {', '.join(WALL_CLOCK)} are available; the other sections count CPU seconds."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=on_gpu, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and rounds")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section; may be repeated")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default: a new file in runs/")
    arguments = parser.parse_args()
    if not checkpoints.is_available():
        parser.exit(2, f"error: {checkpoints.FOLDER} does not exist; BENCH_DATA=folder sets another folder\n")
    machine.prepare_torch()
    available = SECTIONS if machine.device().type == "cpu" else WALL_CLOCK
    sections = arguments.only or available
    if not set(sections) <= set(available):
        parser.exit(2, f"error: {on_gpu}\n")
    logging.getLogger("art").setLevel(logging.WARNING)
    workload = QUICK if arguments.quick else FULL
    console.info(_machine_summary())
    tables = []
    for name in sections:
        for table in SECTIONS[name](workload):
            console.table(table.title, list(table.rows[0]), table.cells())
            tables.append(table)
    _write(arguments.out or paths.RUNS / f"speed-{datetime.now(UTC):%Y%m%d-%H%M%S}.json", workload, tables)


# ---- dense PGD


def dense_pgd(workload: Workload) -> Iterator[Table]:
    """PGD with all steps on all images, and with early stop as in the pipeline."""
    yield Table(
        "PGD against other libraries", [row for target in _targets(workload) for row in _pgd_rows(target, workload)]
    )


def _targets(workload: Workload) -> list[BenchmarkTarget]:
    small = [networks.checkpoint_target(name, workload.images) for name in checkpoints.CHECKPOINTS]
    return [*small, *_mixtures(workload)]


def _mixtures(workload: Workload) -> list[BenchmarkTarget]:
    """Returns mixtures of nine experts in the two sizes that the pipeline trains on two cores, with its epsilons."""
    return [_digits_mixture(workload), _cifar10_mixture(workload)]


def _digits_mixture(workload: Workload) -> BenchmarkTarget:
    images, labels = _to_device(networks.labelled_digits(workload.images))
    return networks.mixture_target("mixture 9 x width 16, 8 px", images, labels, width=16, epsilon=0.1)


def _cifar10_mixture(workload: Workload) -> BenchmarkTarget:
    images, labels = _to_device(networks.labelled_cifar10(workload.images // 12))
    return networks.mixture_target("mixture 9 x width 16, 32 px", images, labels, width=16, epsilon=8 / 255)


def _pgd_rows(target: BenchmarkTarget, workload: Workload) -> list[Row]:
    config = PgdConfig(target.epsilon, workload.steps, STEP_SIZE, workload.batch_size)
    cases = _our_pgd(target, config) | _library_pgd(target, config)
    timed = time_interleaved(cases, workload.rounds)
    ours = timed["ours, dense"]
    correct = {name: _is_correct(target, case.result) for name, case in timed.items()}
    return [
        {
            "network": target.name,
            "attack": name,
            "robust %": _percent(correct[name]),
            "as plain float32 %": _percent(correct[name] == correct["plain loop, float32"]),
            **_times(case),
            **_ratios(case, ours),
        }
        for name, case in timed.items()
    ]


def _our_pgd(target: BenchmarkTarget, config: PgdConfig) -> dict[str, Callable[[], Tensor]]:
    """Returns four cases: as in training, in float32, with early stop as in evaluation, and without the engine."""
    model, images, labels = target.model, target.images, target.labels
    settings = Pgd(kind="pgd", steps=config.steps, step_size=config.step_size, restarts=1, loss="ce", targets=0)
    attack, ball = registry.bind(settings, {}), LInf(config.epsilon)
    options: dict[str, Any] = {"ball": ball, "seed": SEED, "purpose": "pgd", "batch_size": config.batch_size}
    all_images = torch.ones_like(labels, dtype=torch.bool)
    plain_model = networks.contiguous_copy(model)

    def run_plain() -> Tensor:
        rows = torch.split(torch.arange(len(labels)), config.batch_size)
        each = [ImageStreams(SEED, "pgd", row) for row in rows]
        return torch.cat(
            [
                attack(plain_model, images[row], labels[row], ball=ball, draws=draws)
                for row, draws in zip(rows, each, strict=True)
            ]
        )

    return {
        "ours, dense": partial(
            engine.attack_without_early_stop, model, images, labels, attack, precision="bfloat16", **options
        ),
        "ours, dense, float32": partial(
            engine.attack_without_early_stop, model, images, labels, attack, precision="float32", **options
        ),
        "ours, early stop": partial(
            engine.attack_dataset, model, images, labels, all_images, attack, precision="bfloat16", **options
        ),
        "plain loop, float32": run_plain,
    }


def _library_pgd(target: BenchmarkTarget, config: PgdConfig) -> dict[str, Callable[[], Tensor]]:
    """Returns each library with the default memory format, and torchattacks with channels_last weights, too."""
    contiguous = networks.contiguous_copy(target.model)
    cases: dict[str, Callable[[], Tensor]] = {
        name: partial(attack, contiguous, target.images, target.labels, config)
        for name, attack in libraries.PGD.items()
    }
    channels_last = partial(libraries.torchattacks_pgd, target.model, target.images, target.labels, config)
    return cases | {"torchattacks, channels_last": channels_last}


# ---- AutoAttack


def autoattack(workload: Workload) -> Iterator[Table]:
    """The standard suite. It takes minutes per network, hence one round without warm-up."""
    targets = [networks.checkpoint_target(name, workload.suite) for name in checkpoints.CHECKPOINTS]
    targets.append(_digits_mixture(workload).first(workload.suite))
    yield Table("standard AutoAttack", [_suite_row(target, workload.batch_size) for target in targets])


def _suite_row(target: BenchmarkTarget, batch_size: int) -> Row:
    contiguous = networks.contiguous_copy(target.model)
    theirs = partial(
        libraries.reference_autoattack, contiguous, target.images, target.labels, epsilon=target.epsilon,
        batch_size=batch_size, seed=SEED,
    )  # fmt: skip
    timed = time_interleaved({"ours": partial(_our_suite, target, batch_size), "reference": theirs}, 1, warmup=False)
    ours, reference = timed["ours"], timed["reference"]
    our_correct, reference_correct = (_is_correct(target, case.result) for case in (ours, reference))
    return {
        "network": target.name,
        "images": len(target.labels),
        "ours: robust %": _percent(our_correct),
        "reference: robust %": _percent(reference_correct),
        "alike %": _percent(our_correct == reference_correct),
        "ours: CPU s": ours.median("cpu"),
        "reference: CPU s": reference.median("cpu"),
        **_ratios(reference, ours),
    }


def _our_suite(target: BenchmarkTarget, batch_size: int) -> Tensor:
    """Returns adversarial images (N, C, H, W): of each image the last successful one, else the clean one."""
    evaluation_target = EvaluationTarget(target.name, target.model, target.images, target.labels)
    attacks = presets.preset("autoattack", (), has_gate=False)
    config = EvaluationConfig(
        LInf(target.epsilon), machine.evaluation_seed(SEED), "bfloat16", batch_size, drop_fallen=True
    )
    outcomes = harness.evaluate(evaluation_target, attacks, config).outcomes.values()
    harness.clear_resume_state(evaluation_target, attacks, config)
    found = target.images.clone()
    for outcome in outcomes:
        fallen = outcome.attacked & ~outcome.correct
        found[fallen] = outcome.images[fallen]
    return found


# ---- joint training


def training_step(workload: Workload) -> Iterator[Table]:
    """PGD of ten steps through the whole mixture, then a step of SGD; both cases use the same random numbers."""
    rows = []
    sizes = _to_device((networks.digit_images(64), networks.cifar10_images(16)))
    for side, images in zip((8, 32), sizes, strict=True):
        model = networks.set_batchnorm_statistics(networks.mixture(images, width=16), images)
        assert isinstance(model, MixtureOfExperts)
        rows += _step_rows(f"mixture 9 x width 16, {side} px", model, images, workload.rounds)
    yield Table("a step of joint training", rows)


def _step_rows(name: str, model: MixtureOfExperts, images: Tensor, rounds: int) -> list[Row]:
    labels = torch.arange(len(images), device=images.device) % len(networks.CLASS_NAMES)
    cases: dict[str, Callable[[], float]] = {
        f"ours, {precision}": joint.our_step(model, images, labels, precision) for precision in PRECISIONS
    }
    cases["plain loop, float32"] = joint.plain_step(model, images, labels)
    timed = time_interleaved(cases, rounds)
    ours = timed[f"ours, {PRECISIONS[0]}"]
    return [
        {"network": name, "images": len(images), "step": step, "loss at the end": case.result}
        | _times(case)
        | _ratios(case, ours)
        for step, case in timed.items()
    ]


# ---- floating-point operations


def operations(workload: Workload) -> Iterator[Table]:
    """GFLOP per second of input gradients, compared with the best matmul of this machine."""
    rows: list[Row] = []
    for width, images in (
        (64, networks.cifar10_images(workload.wide)),
        (16, networks.cifar10_images(4 * workload.wide)),
        (16, networks.digit_images(workload.batch_size)),
    ):
        name = f"mixture 9 x width {width}, {images.shape[3]} px"
        rows += _operation_rows(name, networks.mixture(images, width=width), images, workload.rounds)
    yield Table("operations of a gradient", rows)


def _operation_rows(name: str, model: nn.Module, images: Tensor, rounds: int) -> Iterator[Row]:
    flops = len(images) * networks.gradient_flops(model, images[0])
    for precision in PRECISIONS:
        matmuls = {f"matmul {side}": _matmul(side, precision) for side in MATMUL_SIDES}
        with _gradients({"gradient": (model, images)}, precision) as gradient:
            timed = time_interleaved(gradient | matmuls, rounds)
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
    """Yields cases that compute the input gradient of each (network, images), prepared as in an attack."""
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


# ---- grouped experts


def grouped_experts(workload: Workload) -> Iterator[Table]:
    """Input gradients of the mixture as in the engine, and with one expert after another."""
    cases = [
        (4, networks.digit_images(workload.batch_size)),
        (16, networks.cifar10_images(4)),
        (64, networks.cifar10_images(4)),
    ]
    cases += [(16, networks.digit_images(count)) for count in (4, 64, workload.batch_size)]
    yield Table("grouped experts", [row for width, images in cases for row in _expert_rows(width, images, workload)])


def _expert_rows(width: int, images: Tensor, workload: Workload) -> Iterator[Row]:
    model = networks.mixture(images, width=width)
    for precision in PRECISIONS:
        with (
            _sequential_experts(model, precision) as plain,
            _gradients({"engine": (model, images)}, precision) as engines,
        ):
            timed = time_interleaved(engines | {"in turn": partial(_gradient, plain, images)}, workload.rounds)
        yield {
            "network": f"mixture 9 x width {width}, {images.shape[3]} px",
            "images": len(images),
            "precision": precision,
            "in turn: CPU s": timed["in turn"].median("cpu"),
            "engine: CPU s": timed["engine"].median("cpu"),
            "ratio, CPU": ratio(timed["in turn"], timed["engine"], "cpu"),
        }


@contextmanager
def _sequential_experts(model: MixtureOfExperts, precision: inference.Precision) -> Iterator[Model]:
    """Yields a copy prepared as in the engine, except that the experts are not grouped."""
    copied = copy.deepcopy(model)
    with inference.eval_mode(copied), fold_batchnorm(copied):
        yield engine.FrozenModel(copied, precision, engine.PassCount())


# ---- cost of an attack step


def scaling(workload: Workload) -> Iterator[Table]:
    """Cost by number of experts, compared with single experts; by width, image size and steps."""
    yield Table("cost by number of experts, bfloat16, width 16, 8 px", _by_experts(workload))
    yield Table("cost by width, bfloat16, a single expert, 32 px", _by_width(workload))
    yield Table("cost by image size, bfloat16, a single expert of width 16", _by_side(workload))
    yield Table("cost by steps of dense PGD, bfloat16, a single expert of width 16, 8 px", _by_steps(workload))


def _by_experts(workload: Workload) -> list[Row]:
    images = networks.digit_images(workload.batch_size)
    models: dict[str, nn.Module] = {
        str(count): networks.mixture(images, width=16, experts=count) for count in SIZES["experts"]
    }
    parts = {"single": networks.single_expert(images, width=16), "gate": models["1"].get_submodule("gate")}
    pairs = {name: (model, images) for name, model in (models | parts).items()}
    with _gradients(pairs, "bfloat16") as cases:
        timed = time_interleaved(cases, workload.rounds)
    single, gate = timed["single"].median("cpu"), timed["gate"].median("cpu")
    return [
        {"experts": int(count)}
        | _times(timed[count])
        | {"over a gate and so many lone experts": timed[count].median("cpu") / (gate + int(count) * single)}
        for count in models
    ]


def _by_width(workload: Workload) -> list[Row]:
    images = networks.cifar10_images(workload.wide)
    models = {str(width): networks.single_expert(images, width=width) for width in SIZES["width"]}
    return _cost_rows("width", {name: (model, images) for name, model in models.items()}, workload.rounds)


def _by_side(workload: Workload) -> list[Row]:
    images = {str(side): networks.cifar10_images(workload.wide, side) for side in SIZES["side"]}
    pairs = {side: (networks.single_expert(of_side, width=16), of_side) for side, of_side in images.items()}
    return _cost_rows("side", pairs, workload.rounds)


def _cost_rows(what: str, pairs: Mapping[str, tuple[nn.Module, Tensor]], rounds: int) -> list[Row]:
    with _gradients(pairs, "bfloat16") as cases:
        timed = time_interleaved(cases, rounds)
    work = {name: len(images) * networks.gradient_flops(model, images[0]) for name, (model, images) in pairs.items()}
    return [
        {what: int(name), "images": len(pairs[name][1]), "GFLOP": work[name] / 1e9}
        | _times(case)
        | {"GFLOP/CPU s": work[name] / case.median("cpu") / 1e9}
        for name, case in timed.items()
    ]


def _by_steps(workload: Workload) -> list[Row]:
    images = networks.digit_images(workload.batch_size)
    target = networks.BenchmarkTarget(
        "expert", networks.single_expert(images, width=16), images, torch.arange(len(images)) % 10, 0.1
    )
    counts = (workload.steps, 2 * workload.steps, 4 * workload.steps)
    configs = {steps: PgdConfig(target.epsilon, steps, STEP_SIZE, workload.batch_size) for steps in counts}
    timed = time_interleaved(
        {str(steps): _our_pgd(target, config)["ours, dense"] for steps, config in configs.items()}, workload.rounds
    )
    return [
        {"steps": steps} | _times(timed[str(steps)]) | {"CPU ms a step": 1000 * timed[str(steps)].median("cpu") / steps}
        for steps in configs
    ]


SECTIONS: Mapping[str, Callable[[Workload], Iterator[Table]]] = {
    "pgd": dense_pgd,
    "autoattack": autoattack,
    "training": training_step,
    "operations": operations,
    "experts": grouped_experts,
    "scaling": scaling,
}
WALL_CLOCK = ("pgd", "autoattack", "training")  # sections whose rows have CPU and wall-clock seconds


# ---- rows and output files


def _to_device(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the tensors on the current device."""
    return tuple(tensor.to(machine.device()) for tensor in tensors)


def _is_correct(target: BenchmarkTarget, images_NCHW: Tensor) -> Tensor:
    """Returns which images, projected into the ball, a float32 forward pass classifies correctly, as bool (N,)."""
    projected_NCHW = LInf(target.epsilon).project(images_NCHW, target.images)
    correct_N: Tensor = (
        inference.predict(target.model, projected_NCHW, min(len(projected_NCHW), DECISION_BATCH)).argmax(1)
        == target.labels
    )
    return correct_N


def _percent(mask_N: Tensor) -> float:
    return 100 * float(mask_N.float().mean())


def _times(case: Timed[Any]) -> Row:
    return {"CPU s": case.median("cpu"), "wall s": case.median("wall")}


def _ratios(case: Timed[Any], ours: Timed[Any]) -> Row:
    return {"times ours, CPU": ratio(case, ours, "cpu"), "times ours, wall": ratio(case, ours, "wall")}


def _cell(value: object) -> str:
    """Formats a float with three significant digits, other values with str."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _machine_summary() -> str:
    device, threads = machine.device(), torch.get_num_threads()
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{_processor()}, {threads} of {machine.usable_cores()} cores, torch {version('torch')}"


def _processor() -> str:
    """Returns the processor's name from /proc/cpuinfo on Linux, else from Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else dict(machine.describe())["device"]


def _write(path: Path, workload: Workload, tables: Sequence[Table]) -> None:
    """Writes the tables as JSON, and as Markdown with the same name."""
    header = {
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "machine": _machine_summary(),
        "packages": {package: version(package) for package in PACKAGES},
        "effort": asdict(workload),
    }
    rows = {
        table.title: [{name: _json_value(value) for name, value in row.items()} for row in table.rows]
        for table in tables
    }
    files.write_json(path, header | {"tables": rows})
    packages = ", ".join(f"{name} {number}" for name, number in header["packages"].items())  # type: ignore[attr-defined]
    first_line = f"`{header['command']}` on {header['machine']}; {packages}.\n"
    files.write_text(path.with_suffix(".md"), "\n".join([first_line, *(table.markdown() for table in tables)]))
    console.info(f"written to {path} and {path.with_suffix('.md')}")


def _json_value(value: object) -> Any:
    return asdict(value) if isinstance(value, Ratio) else value


if __name__ == "__main__":
    main()

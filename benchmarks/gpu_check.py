"""Speed of a GPU and its agreement with the CPU: `make gpu-check` trains nine full-width ResNet-18 for a few steps on
images of CIFAR-10's shape. It reports memory, images per second, decisions compared with the CPU, and resume.

The images are those of `prepare` if they are 32x32 in colour, else scikit-learn's digits, enlarged. Exit code 0 if all
checks pass, 1 if one fails, 2 without a GPU. `--device cpu` runs a tiny form, to test the script itself.

Shapes: N images, B batch, C channel, H/W pixels.
"""

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchStream
from advmoe.core import console, paths, resources
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.models import inference
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import storage
from advmoe.statistics.paired_tests import mcnemar_p_value
from advmoe.training.batch_attacks import BatchAttack
from advmoe.training.flops import measure_flops
from advmoe.training.trainer import Trainer
from benchmarks import joint, networks

SHAPE = (3, 32, 32)  # CIFAR-10's
MEMORY_LIMIT = 16e9  # bytes, for nine experts at batch size 128
LOGIT_TOLERANCE = 1e-3  # relative to the largest logit: float32 sums in another order, over twenty layers
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
MIN_AGREEMENT, ACCURACY_TOLERANCE = 0.98, 0.5  # share of equal decisions; percentage points of robust accuracy
P_THRESHOLD = 0.1  # of a two-sided McNemar test
MAX_FIT_ROUNDS, MIN_ROBUST = (
    8,
    0.1,
)  # of fitting; share of robust images that the comparison needs
WARMUP_STEPS, TIMED_STEPS = 3, 3  # steps; CUDA graphs are captured when a step repeats
EXPERT_STEPS = 30  # of the attack on one expert: the mean of the paper's range


@dataclass(frozen=True)
class CheckSize:
    """Sizes of a check. `compared`: number of images whose decisions are compared; `ascent`: steps of PGD for them."""

    width: int
    experts: int
    batch: int
    compared: int
    ascent: int


FULL = CheckSize(width=64, experts=9, batch=128, compared=200, ascent=5)
TINY = CheckSize(width=4, experts=2, batch=8, compared=30, ascent=3)


@dataclass(frozen=True)
class Row:
    """One row of the table. `passed` is None for a measurement without requirement."""

    name: str
    measured: str
    required: str = ""
    passed: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu for the tiny form")
    os.environ[f"{machine.PREFIX}DEVICE"] = parser.parse_args(arguments).device
    machine.machine.cache_clear()
    try:
        device = machine.device()
        machine.prepare_torch()
        rows = run_checks(FULL if device.type == "cuda" else TINY, device)
    except UserError as error:
        console.warn(str(error))
        return 2
    console.table(f"{device}: {dict(machine.describe())['device']}", *_table_cells(rows))
    return int(any(row.passed is False for row in rows))


def _table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    verdict = {True: "yes", False: "NO", None: ""}
    return ["check", "measured", "required", "ok"], [
        [row.name, row.measured, row.required, verdict[row.passed]] for row in rows
    ]


def run_checks(scale: CheckSize, device: torch.device) -> list[Row]:
    """Returns the rows of all checks."""
    images, labels = load_images(scale.compared)
    model = networks.mixture(images, width=scale.width, experts=scale.experts)
    batch = (images[: scale.batch].to(device), labels[: scale.batch].to(device))
    return [
        *speed_rows(model, *batch, device),
        *resume_rows(model, *batch),
        *parity_rows(
            fit_until_robust(model, images.to(device), labels.to(device), scale), images, labels, scale, device
        ),
    ]


def load_images(count: int) -> tuple[Tensor, Tensor]:
    """Returns at most `count` images (N, 3, 32, 32) in [0, 1] and their labels (N,)."""
    if paths.DATASET.exists():
        data = dataset.load(paths.DATASET)
        if (data.facts.channels, data.facts.height, data.facts.width) == SHAPE and data.facts.classes == 10:
            train = data["train"].first(count)
            return train.pixels(), train.labels
    digits, labels = networks.labelled_digits(count)
    return functional.interpolate(digits, SHAPE[1:], mode="bilinear").expand(-1, *SHAPE), labels


# ---- speed and memory


def speed_rows(model: MixtureOfExperts, images: Tensor, labels: Tensor, device: torch.device) -> list[Row]:
    """Attacks with and without CUDA graphs, and joint training steps with and without activation checkpointing."""
    copied, count = copy.deepcopy(model).to(device), len(labels)
    attack_flops = joint.STEPS * count * networks.gradient_flops(copied, images[0])
    rows = [
        *_cuda_graph_rows("mixture", copied, images, labels, joint.STEPS),
        *_cuda_graph_rows("expert", copied.experts[0], images, labels, EXPERT_STEPS),
    ]
    for checkpointing in (False, True):
        run = joint.make_trainer(copy.deepcopy(model), images, labels, "bfloat16", checkpointing=checkpointing)
        flops = measure_flops(run.task, images, labels)
        seconds, peak = time_steps(partial(run.step, images, labels), device)
        name = f"joint step{', checkpointing' if checkpointing else ''}"
        rows.append(_throughput_row(name, count, seconds, attack_flops + count * flops.learning))
        required = f"below {MEMORY_LIMIT / 1e9:.0f} GB"
        rows.append(Row(f"peak memory, {name}", f"{peak / 1e9:.2f} GB", required, peak < MEMORY_LIMIT))
    return rows


def _cuda_graph_rows(name: str, model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[Row]:
    """Returns the rows of an attack with and without CUDA graphs."""
    flops = steps * len(labels) * networks.gradient_flops(model, images[0])
    drawn, rows, results = BatchAttack(_attack(steps), LInf(joint.EPSILON)), [], []
    for setting in ("0", "1"):
        with _environment_variable("GRAPHS", setting):

            def attack() -> None:
                draws = BatchStream(machine.generator("gpu_check"))
                results.append(
                    engine.attack_batch(
                        model, images, labels, drawn.function, ball=drawn.ball, draws=draws, precision="bfloat16"
                    )
                )

            seconds, _ = time_steps(attack, images.device)
        rows.append(_throughput_row(f"{name}, PGD-{steps}, ADVMOE_GRAPHS={setting}", len(labels), seconds, flops))
    differing = int((results[0] != results[-1]).sum())
    return [*rows, Row(f"{name}: pixels that differ", str(differing), "0", differing == 0)]


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Context manager that sets `ADVMOE_{name}`."""
    previous = os.environ.get(f"{machine.PREFIX}{name}")
    os.environ[f"{machine.PREFIX}{name}"] = value
    machine.machine.cache_clear()
    try:
        yield
    finally:
        if previous is None:
            del os.environ[f"{machine.PREFIX}{name}"]
        else:
            os.environ[f"{machine.PREFIX}{name}"] = previous
        machine.machine.cache_clear()


def time_steps(function: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Returns the mean seconds of a call after warm-up, and the peak memory in bytes."""
    for _ in range(WARMUP_STEPS):
        function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / TIMED_STEPS, resources.peak_memory()


def _throughput_row(name: str, count: int, seconds: float, flops: int) -> Row:
    return Row(name, f"{count / seconds:.1f} images/s, {flops / seconds / 1e12:.3f} TFLOP/s")


# ---- resume, and agreement with the CPU


def resume_rows(model: MixtureOfExperts, images: Tensor, labels: Tensor) -> list[Row]:
    """Compares four training steps with two, a checkpoint file, and two more."""
    uninterrupted, resumed = (joint.make_trainer(copy.deepcopy(model), images, labels, "bfloat16") for _ in range(2))
    _train(uninterrupted, images, labels, 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        storage.save_checkpoint(file, uninterrupted.state.checkpoint())
        checkpoint = storage.load_checkpoint(file)
    assert checkpoint is not None
    resumed.state.load(checkpoint)
    for run in (uninterrupted, resumed):
        _train(run, images, labels, 2)
    states = (run.task.model.state_dict().values() for run in (uninterrupted, resumed))
    differing = sum(not torch.equal(one, other) for one, other in zip(*states, strict=True))
    return [Row("resume: tensors that differ", str(differing), "0", differing == 0)]


def _train(run: Trainer, images: Tensor, labels: Tensor, steps: int) -> None:
    for _ in range(steps):
        run.step(images, labels)


def fit_until_robust(model: MixtureOfExperts, images: Tensor, labels: Tensor, scale: CheckSize) -> nn.Module:
    """Returns a copy trained adversarially until some images are robust, as the comparison of decisions requires."""
    copied = networks.set_batchnorm_statistics(copy.deepcopy(model).to(images.device), images)
    for _ in range(MAX_FIT_ROUNDS):
        networks.fit_adversarially(copied, images, labels, joint.EPSILON)
        if robust_decisions(copied, images, labels, scale, "float32").float().mean() >= MIN_ROBUST:
            break
    return copied


def parity_rows(model: nn.Module, images: Tensor, labels: Tensor, scale: CheckSize, device: torch.device) -> list[Row]:
    """Compares float32 logits, and decisions under PGD: in float32 on the CPU, in both precisions on the device."""
    reference, batch = copy.deepcopy(model).cpu(), (images.to(device), labels.to(device))
    expected = robust_decisions(reference, images, labels, scale, "float32")
    share = float(expected.float().mean())
    in_float32, in_bfloat16 = (robust_decisions(model, *batch, scale, each).cpu() for each in PRECISIONS)
    return [
        _logits(
            inference.predict(model, batch[0], scale.batch).cpu(), inference.predict(reference, images, scale.batch)
        ),
        Row("robust images on the CPU", f"{share:.0%}", f"at least {MIN_ROBUST:.0%}", share >= MIN_ROBUST),
        *_agreement_rows(in_float32, expected),
        _bfloat16_row(in_bfloat16, expected),
    ]


def _logits(actual: Tensor, expected: Tensor) -> Row:
    difference = float((actual - expected).abs().max() / expected.abs().max())
    return Row(
        "logits compared with the CPU",
        f"{difference:.1e} of the largest",
        f"at most {LOGIT_TOLERANCE:g}",
        difference <= LOGIT_TOLERANCE,
    )


def _agreement_rows(actual: Tensor, expected: Tensor) -> list[Row]:
    agreement, (ours, theirs) = float((actual == expected).float().mean()), _accuracies(actual, expected)
    return [
        Row(
            "decisions under PGD", f"{agreement:.1%} equal", f"at least {MIN_AGREEMENT:.0%}", agreement >= MIN_AGREEMENT
        ),
        Row(
            "robust accuracy",
            _format_accuracies(ours, theirs),
            f"within {ACCURACY_TOLERANCE} points",
            abs(ours - theirs) <= ACCURACY_TOLERANCE,
        ),
    ]


def _bfloat16_row(actual: Tensor, expected: Tensor) -> Row:
    """Checks that the attack in bfloat16 is not weaker: rounding may change which images are broken, not how many.

    Exact McNemar test on the images whose decisions differ.
    """
    more, less = (int(each.sum()) for each in (actual & ~expected, expected & ~actual))
    p = mcnemar_p_value(more, less)
    measured = f"{_format_accuracies(*_accuracies(actual, expected))}; {more} : {less} images"
    name = "robust accuracy, attacked in bfloat16"
    return Row(name, measured, f"not significantly higher (p {P_THRESHOLD:g})", more <= less or p >= P_THRESHOLD)


def _accuracies(*robust: Tensor) -> tuple[float, ...]:
    return tuple(100 * float(each.double().mean()) for each in robust)


def _format_accuracies(ours: float, theirs: float) -> str:
    return f"{ours:.1f}, CPU {theirs:.1f}"


def robust_decisions(
    model: nn.Module, images: Tensor, labels: Tensor, scale: CheckSize, precision: Precision
) -> Tensor:
    """Returns which images (N,) are robust against PGD, always from the same random starts."""
    all_images = torch.ones_like(labels, dtype=torch.bool)
    adversarial = engine.attack_dataset(
        model, images, labels, all_images, partial(pgd, settings=_attack(scale.ascent)), ball=LInf(joint.EPSILON),
        seed=joint.SEED, purpose="gpu_check", precision=precision, batch_size=scale.batch,
    )  # fmt: skip
    return inference.predict(model, adversarial, scale.batch).argmax(1) == labels


def _attack(steps: int) -> Pgd:
    return Pgd(kind="pgd", steps=steps, step_size=joint.STEP_SIZE, restarts=1, loss="ce", targets=0)


if __name__ == "__main__":
    raise SystemExit(main())

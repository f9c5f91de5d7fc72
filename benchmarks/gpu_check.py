"""Does this GPU do what the CPU does, and how fast? `make gpu-check` trains nine full-width ResNet-18 for a few steps
on images of CIFAR-10's shape: memory, images a second, decisions beside the CPU's, and resume.

The images are those that `prepare` left, where they are 32x32 in colour; else scikit-learn's embedded digits, enlarged.
Exit code 0 when all is as it should be, 1 when a row says no, 2 without a GPU. `--device cpu` runs a tiny form of the
same, to try the script itself.

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
from advmoe.attacks.random_streams import BatchDraws
from advmoe.core import console, paths, resources
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.models import inference
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import storage
from advmoe.statistics.paired_tests import mcnemar
from advmoe.training.batch_attacks import Drawn, craft
from advmoe.training.flops import measure_flops
from advmoe.training.trainer import Trainer
from benchmarks import joint, networks

SHAPE = (3, 32, 32)  # CIFAR-10's
MEMORY = 16e9  # bytes that nine experts at batch 128 must fit into
LOGITS = 1e-3  # of the largest logit: float32 sums in another order, over twenty layers
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
AGREEMENT, POINTS = 0.98, 0.5  # of decisions; of robust accuracy, in points
CHANCE = 0.1  # two-sided p of a test that looks at one side: below it is none
ROUNDS, STANDING = 8, 0.1  # of fitting, at most; share of images that must withstand PGD for decisions to tell anything
WARM, TIMED = 3, 3  # steps; only those that repeat are recorded
STEPS = 30  # of the attack on one expert: what the paper draws from, on average


@dataclass(frozen=True)
class Scale:
    """How large a check. `compared`: images whose decisions are compared, after `ascent` steps of PGD."""

    width: int
    experts: int
    batch: int
    compared: int
    ascent: int


FULL = Scale(width=64, experts=9, batch=128, compared=200, ascent=5)
TINY = Scale(width=4, experts=2, batch=8, compared=30, ascent=3)


@dataclass(frozen=True)
class Row:
    """One line of the table; `ok` is None where a number is only told."""

    what: str
    found: str
    wanted: str = ""
    ok: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, show the table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu for the tiny form")
    os.environ[f"{machine.PREFIX}DEVICE"] = parser.parse_args(arguments).device
    machine.machine.cache_clear()
    try:
        place = machine.device()
        machine.prepare_torch()
        rows = check(FULL if place.type == "cuda" else TINY, place)
    except UserError as error:
        console.warn(str(error))
        return 2
    console.table(f"{place}: {dict(machine.describe())['device']}", *_shown(rows))
    return int(any(row.ok is False for row in rows))


def _shown(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    verdict = {True: "yes", False: "NO", None: ""}
    return ["what", "found", "wanted", "ok"], [[row.what, row.found, row.wanted, verdict[row.ok]] for row in rows]


def check(scale: Scale, place: torch.device) -> list[Row]:
    """All rows."""
    images, labels = pictures(scale.compared)
    model = networks.mixture(images, width=scale.width, experts=scale.experts)
    batch = (images[: scale.batch].to(place), labels[: scale.batch].to(place))
    return [
        *speed(model, *batch, place),
        *resume(model, *batch),
        *parity(fitted(model, images.to(place), labels.to(place), scale), images, labels, scale, place),
    ]


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [0, 1] and their labels (N,), as many as there are and `count` at most."""
    if paths.DATASET.exists():
        data = dataset.load(paths.DATASET)
        if (data.facts.channels, data.facts.height, data.facts.width) == SHAPE and data.facts.classes == 10:
            train = data["train"].first(count)
            return train.pixels(), train.labels
    digits, labels = networks.labelled_digits(count)
    return functional.interpolate(digits, SHAPE[1:], mode="bilinear").expand(-1, *SHAPE), labels


# ---- speed and memory


def speed(model: MixtureOfExperts, images: Tensor, labels: Tensor, place: torch.device) -> list[Row]:
    """Crafting with and without recorded steps, and joint steps with PGD-10 with and without checkpointing."""
    own, count = copy.deepcopy(model).to(place), len(labels)
    crafting = joint.STEPS * count * networks.gradient_flops(own, images[0])
    rows = [
        *_recorded("mixture", own, images, labels, joint.STEPS),
        *_recorded("expert", own.experts[0], images, labels, STEPS),
    ]
    for checkpointing in (False, True):
        run = joint.run_of(copy.deepcopy(model), images, labels, "bfloat16", checkpointing=checkpointing)
        each = measure_flops(run.learner, images, labels)
        seconds, peak = timed(partial(run.step, images, labels), place)
        what = f"joint step{', checkpointing' if checkpointing else ''}"
        rows.append(_rate(what, count, seconds, crafting + count * each.learning))
        wanted = f"below {MEMORY / 1e9:.0f} GB"
        rows.append(Row(f"peak memory, {what}", f"{peak / 1e9:.2f} GB", wanted, peak < MEMORY))
    return rows


def _recorded(what: str, model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[Row]:
    """An attack with and without recorded steps."""
    flops = steps * len(labels) * networks.gradient_flops(model, images[0])
    drawn, rows, found = Drawn(_attack(steps), LInf(joint.EPSILON)), [], []
    for setting in ("0", "1"):
        with _variable("GRAPHS", setting):

            def work() -> None:
                draws = BatchDraws(machine.generator("gpu_check"))
                found.append(craft(model, images, labels, drawn, draws, "bfloat16"))

            seconds, _ = timed(work, images.device)
        rows.append(_rate(f"{what}, PGD-{steps}, ADVMOE_GRAPHS={setting}", len(labels), seconds, flops))
    differing = int((found[0] != found[-1]).sum())
    return [*rows, Row(f"{what}: pixels that differ", str(differing), "0", differing == 0)]


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """`ADVMOE_name` for a while."""
    before = os.environ.get(f"{machine.PREFIX}{name}")
    os.environ[f"{machine.PREFIX}{name}"] = value
    machine.machine.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[f"{machine.PREFIX}{name}"]
        else:
            os.environ[f"{machine.PREFIX}{name}"] = before
        machine.machine.cache_clear()


def timed(work: Callable[[], object], place: torch.device) -> tuple[float, int]:
    """Seconds of one call, and the most memory in bytes that it took."""
    for _ in range(WARM):
        work()
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        torch.cuda.synchronize(place)
    started = time.perf_counter()
    for _ in range(TIMED):
        work()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return (time.perf_counter() - started) / TIMED, resources.peak_memory()


def _rate(what: str, count: int, seconds: float, flops: int) -> Row:
    return Row(what, f"{count / seconds:.1f} images/s, {flops / seconds / 1e12:.3f} TFLOP/s")


# ---- the same as without a kill, and the same as on the CPU


def resume(model: MixtureOfExperts, images: Tensor, labels: Tensor) -> list[Row]:
    """Four steps at once, and two, through a file, and two."""
    whole, again = (joint.run_of(copy.deepcopy(model), images, labels, "bfloat16") for _ in range(2))
    _learn(whole, images, labels, 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        storage.save_checkpoint(file, whole.state())
        found = storage.load_checkpoint(file)
    assert found is not None
    again.restore(found)
    for run in (whole, again):
        _learn(run, images, labels, 2)
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    differing = sum(not torch.equal(one, other) for one, other in pairs)
    return [Row("resume: tensors that differ", str(differing), "0", differing == 0)]


def _learn(run: Trainer, images: Tensor, labels: Tensor, steps: int) -> None:
    for _ in range(steps):
        run.step(images, labels)


def fitted(model: MixtureOfExperts, images: Tensor, labels: Tensor, scale: Scale) -> nn.Module:
    """The network after so many steps on these images that some of them stand: all that fall alike show nothing."""
    own = networks.settled(copy.deepcopy(model).to(images.device), images)
    for _ in range(ROUNDS):
        networks.fit(own, images, labels, joint.EPSILON)
        if decisions(own, images, labels, scale, "float32").float().mean() >= STANDING:
            break
    return own


def parity(model: nn.Module, images: Tensor, labels: Tensor, scale: Scale, place: torch.device) -> list[Row]:
    """Logits in float32, and decisions under a short PGD: crafted in float32 on the CPU, in both types here."""
    reference, there = copy.deepcopy(model).cpu(), (images.to(place), labels.to(place))
    expected = decisions(reference, images, labels, scale, "float32")
    share = float(expected.float().mean())
    in_float32, in_bfloat16 = (decisions(model, *there, scale, each).cpu() for each in PRECISIONS)
    return [
        _logits(
            inference.predict(model, there[0], scale.batch).cpu(), inference.predict(reference, images, scale.batch)
        ),
        Row("images that stand on the CPU", f"{share:.0%}", f"at least {STANDING:.0%}", share >= STANDING),
        *_alike(in_float32, expected),
        _not_weaker(in_bfloat16, expected),
    ]


def _logits(found: Tensor, expected: Tensor) -> Row:
    difference = float((found - expected).abs().max() / expected.abs().max())
    return Row(
        "logits beside the CPU's", f"{difference:.1e} of the largest", f"at most {LOGITS:g}", difference <= LOGITS
    )


def _alike(found: Tensor, expected: Tensor) -> list[Row]:
    agreement, (ours, theirs) = float((found == expected).float().mean()), _points(found, expected)
    return [
        Row("decisions under PGD", f"{agreement:.1%} alike", f"at least {AGREEMENT:.0%}", agreement >= AGREEMENT),
        Row("robust accuracy", _beside(ours, theirs), f"within {POINTS} points", abs(ours - theirs) <= POINTS),
    ]


def _not_weaker(found: Tensor, expected: Tensor) -> Row:
    """Where a few steps decide, another rounding lets other images fall; only a weaker attack would flatter.

    Exact McNemar test on the images that one of them alone makes fall.
    """
    more, less = (int(each.sum()) for each in (found & ~expected, expected & ~found))
    p = mcnemar(more, less)
    what, told = "robust accuracy, crafted in bfloat16", f"{_beside(*_points(found, expected))}; {more} : {less} images"
    return Row(what, told, f"not more beyond chance (p {CHANCE:g})", more <= less or p >= CHANCE)


def _points(*standing: Tensor) -> tuple[float, ...]:
    return tuple(100 * float(each.double().mean()) for each in standing)


def _beside(ours: float, theirs: float) -> str:
    return f"{ours:.1f}, CPU {theirs:.1f}"


def decisions(model: nn.Module, images: Tensor, labels: Tensor, scale: Scale, precision: Precision) -> Tensor:
    """Which images (N,) stand under PGD from the same random starts."""
    everyone = torch.ones_like(labels, dtype=torch.bool)
    attacked = engine.attack_dataset(
        model, images, labels, everyone, partial(pgd, settings=_attack(scale.ascent)), ball=LInf(joint.EPSILON),
        seed=joint.SEED, purpose="gpu_check", precision=precision, batch_size=scale.batch,
    )  # fmt: skip
    return inference.predict(model, attacked, scale.batch).argmax(1) == labels


def _attack(steps: int) -> Pgd:
    return Pgd(kind="pgd", steps=steps, step_size=joint.STEP_SIZE, restarts=1, loss="ce", targets=0)


if __name__ == "__main__":
    raise SystemExit(main())

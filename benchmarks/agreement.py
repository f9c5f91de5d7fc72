"""Agreement of our attacks with other implementations. `make bench` runs this in a virtual environment of its own.

- `autoattack` against the decisions of the reference implementation, per image, on three robust networks.
- `fgsm` and `pgd` against torchattacks and foolbox, from the same random starts: pixels and decisions.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import foolbox
import torch
import torchattacks
from torch import Tensor, nn

from advmoe.attacks import presets
from advmoe.attacks.ball import LInf
from advmoe.attacks.fgsm import Fgsm, fgsm
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchStream
from advmoe.core import console
from advmoe.evaluation.harness import DECISION_BATCH, EvaluationConfig, EvaluationTarget, clear_resume_state, evaluate
from advmoe.models import inference
from advmoe.runtime import machine
from advmoe.runtime.machine import evaluation_seed
from advmoe.statistics.decisions import WORST
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import compare_paired, mcnemar_p_value
from benchmarks import checkpoints, libraries
from benchmarks.libraries import PgdConfig

STEPS, STEP_SIZE = 40, 0.1  # of the compared PGD; the step size is a fraction of epsilon
LIBRARY_IMAGES = 200


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=None, help="only the first IMAGES images of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--network", choices=checkpoints.CHECKPOINTS, action="append", help="only this network; may be repeated"
    )
    arguments = parser.parse_args()
    if not checkpoints.is_available():
        parser.exit(2, f"error: {checkpoints.FOLDER} does not exist; BENCH_DATA=folder sets another folder\n")
    machine.prepare_torch()
    names = arguments.network or list(checkpoints.CHECKPOINTS)
    console.table(
        "fgsm and pgd against other libraries, same random starts",
        ["network", "attack", "library", "largest pixel difference", "equal decisions", "ours %", "theirs %"],
        [row for name in names for row in library_rows(name)],
    )
    console.table(
        f"autoattack against the reference implementation, seed {arguments.seed}",
        [
            "network",
            "images",
            "clean %",
            "ours % [95 % Wilson interval]",
            "reference %",
            "equal decisions %",
            "broken only by ours",
            "broken only by reference",
            "McNemar p",
            "seconds",
        ],
        [autoattack_row(name, arguments.images, arguments.seed) for name in names],
    )


def autoattack_row(name: str, count: int | None, seed: int) -> list[str]:
    """Returns one row: the standard suite in float32 against the reference's decisions."""
    reference = checkpoints.load_reference(name)
    pixels, labels = checkpoints.load_images(
        name, len(reference.clean) if count is None else min(count, len(reference.clean))
    )
    target = EvaluationTarget(name, checkpoints.load_model(name), pixels, labels)
    attacks = presets.preset("autoattack", (), has_gate=False)
    config = EvaluationConfig(LInf(reference.epsilon), evaluation_seed(seed), "float32", None, drop_fallen=True)
    started = time.monotonic()
    result = evaluate(target, attacks, config)
    seconds = time.monotonic() - started
    clear_resume_state(target, attacks, config)
    ours, theirs = result.correct[WORST], reference.autoattack[: len(labels)]
    paired = compare_paired(ours, theirs, seed)
    return [
        name,
        str(len(labels)),
        f"{100 * result.accuracies()['clean'].accuracy:.1f}",
        str(Proportion.from_mask(ours)),
        f"{100 * float(theirs.float().mean()):.1f}",
        f"{100 * float((ours == theirs).float().mean()):.1f}",
        str(paired.only_second),
        str(paired.only_first),
        f"{mcnemar_p_value(paired.only_first, paired.only_second):.2f}",
        f"{seconds:.0f}",
    ]


class FixedNoise:
    """Random draws that return the noise of another library."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def uniform(self, like: Tensor) -> Tensor:
        """Returns the noise as a fraction of epsilon."""
        return self.noise.to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Not used by L-inf attacks."""
        raise NotImplementedError(like)

    def pick(self, rows: Tensor) -> "FixedNoise":
        """Returns the noise of the images `rows`."""
        return FixedNoise(self.noise[rows])


@dataclass(frozen=True)
class LibraryAttack:
    """An attack of another library, and the noise of its random start as a fraction of epsilon; None without."""

    name: str
    attack: Callable[[nn.Module, Tensor, Tensor, float], Tensor]
    noise: Callable[[Tensor, float], Tensor] | None


def library_rows(name: str) -> list[list[str]]:
    """Returns the rows of one network."""
    model = checkpoints.load_model(name)
    epsilon = checkpoints.load_reference(name).epsilon
    pixels, labels = checkpoints.load_images(name, LIBRARY_IMAGES)
    return [_library_row(name, model, pixels, labels, epsilon, attack) for attack in LIBRARY_ATTACKS]


def _library_row(
    name: str, model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, library: LibraryAttack
) -> list[str]:
    torch.manual_seed(0)
    theirs = library.attack(model, pixels, labels, epsilon).detach()
    torch.manual_seed(0)
    ours = _ours(model, pixels, labels, epsilon, library)
    predictions = [inference.predict(model, images, DECISION_BATCH).argmax(1) for images in (ours, theirs)]
    accuracies = [100 * float((predicted == labels).float().mean()) for predicted in predictions]
    return [
        name,
        "fgsm" if library.noise is None else "pgd",
        library.name,
        f"{float((ours - theirs).abs().max()):.1e}",
        f"{100 * float((predictions[0] == predictions[1]).float().mean()):.1f} %",
        f"{accuracies[0]:.1f}",
        f"{accuracies[1]:.1f}",
    ]


def _ours(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, library: LibraryAttack) -> Tensor:
    ball = LInf(epsilon)
    if library.noise is None:
        return fgsm(model, pixels, labels, ball=ball, settings=Fgsm(kind="fgsm"), draws=BatchStream(torch.Generator()))
    settings = Pgd(kind="pgd", steps=STEPS, step_size=STEP_SIZE, restarts=1, loss="ce", targets=0)
    return pgd(model, pixels, labels, ball=ball, settings=settings, draws=FixedNoise(library.noise(pixels, epsilon)))


def _torchattacks_fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    adversarial: Tensor = torchattacks.FGSM(model, eps=epsilon)(pixels, labels)
    return adversarial


def _foolbox_fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, adversarial, _ = foolbox.attacks.FGSM()(wrapped, pixels, labels, epsilons=epsilon)
    return adversarial  # type: ignore[no-any-return]


def _pgd(attack: libraries.Attack) -> Callable[[nn.Module, Tensor, Tensor, float], Tensor]:
    def run(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        return attack(
            model, pixels, labels, PgdConfig(epsilon, STEPS, STEP_SIZE, LIBRARY_IMAGES)
        )  # one batch, so that noise is drawn once

    return run


def _uniform(pixels: Tensor, epsilon: float) -> Tensor:
    """Returns the noise that both libraries draw from the global generator, as a fraction of epsilon."""
    return torch.empty_like(pixels).uniform_(-epsilon, epsilon) / epsilon


LIBRARY_ATTACKS = (
    LibraryAttack("torchattacks", _torchattacks_fgsm, None),
    LibraryAttack("foolbox", _foolbox_fgsm, None),
    LibraryAttack("torchattacks", _pgd(libraries.torchattacks_pgd), _uniform),
    LibraryAttack("foolbox", _pgd(libraries.foolbox_pgd), _uniform),
)


if __name__ == "__main__":
    main()

"""Do our attacks find what others' find? `make bench` runs this in a virtual environment of its own.

- `autoattack` against the decisions of the reference implementation, example by example, on three robust networks.
- `fgsm` and `pgd` against torchattacks and foolbox, from equal starts: pixels and decisions.
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
from advmoe.attacks.random_streams import BatchDraws
from advmoe.core import console
from advmoe.evaluation.harness import DECISION_BATCH, EvaluationConfig, EvaluationTarget, clear_resume_state, evaluate
from advmoe.models import inference
from advmoe.runtime import machine
from advmoe.runtime.machine import evaluation_seed
from advmoe.statistics.decisions import WORST
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import compare, mcnemar
from benchmarks import checkpoints
from benchmarks import peers as libraries
from benchmarks.peers import Climb

STEPS, STEP_SIZE = 40, 0.1  # of the PGD that is compared: forty steps of a tenth of epsilon
PEERS_ON = 200  # images


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=None, help="only the first so many images of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--network", choices=checkpoints.CHECKPOINTS, action="append", help="only this one; may be repeated"
    )
    arguments = parser.parse_args()
    if not checkpoints.available():
        parser.exit(2, f"error: {checkpoints.FOLDER} is not there; BENCH_DATA=folder names another place\n")
    machine.prepare_torch()
    names = arguments.network or list(checkpoints.CHECKPOINTS)
    console.table(
        "fgsm and pgd against others, equal starts",
        ["network", "attack", "peer", "largest pixel difference", "decisions alike", "ours %", "theirs %"],
        [row for name in names for row in peers(name)],
    )
    console.table(
        f"autoattack against the reference implementation, seed {arguments.seed}",
        [
            "network",
            "images",
            "clean %",
            "ours % [95 % Wilson interval]",
            "reference %",
            "alike %",
            "only ours finds",
            "only theirs finds",
            "McNemar p",
            "seconds",
        ],
        [reference(name, arguments.images, arguments.seed) for name in names],
    )


def reference(name: str, count: int | None, seed: int) -> list[str]:
    """One row: the standard suite in float32 against the reference's decisions."""
    theirs = checkpoints.reference(name)
    pixels, labels = checkpoints.images(name, len(theirs.clean) if count is None else min(count, len(theirs.clean)))
    target = EvaluationTarget(name, checkpoints.model(name), pixels, labels)
    attacks = presets.preset("autoattack", (), has_gate=False)
    terms = EvaluationConfig(LInf(theirs.epsilon), evaluation_seed(seed), "float32", None, drop_fallen=True)
    started = time.monotonic()
    measured = evaluate(target, attacks, terms)
    seconds = time.monotonic() - started
    clear_resume_state(target, attacks, terms)
    ours, robust = measured.correct[WORST], theirs.autoattack[: len(labels)]
    paired = compare(ours, robust, seed)
    return [
        name,
        str(len(labels)),
        f"{100 * measured.shares()['clean'].accuracy:.1f}",
        str(Share.of(ours)),
        f"{100 * float(robust.float().mean()):.1f}",
        f"{100 * float((ours == robust).float().mean()):.1f}",
        str(paired.only_second),
        str(paired.only_first),
        f"{mcnemar(paired.only_first, paired.only_second):.2f}",
        f"{seconds:.0f}",
    ]


class Given:
    """Draws that return what a peer drew."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def uniform(self, like: Tensor) -> Tensor:
        """The peer's noise, as a share of epsilon."""
        return self.noise.to(like)

    def normal(self, like: Tensor) -> Tensor:
        """L-inf attacks never ask."""
        raise NotImplementedError(like)

    def pick(self, rows: Tensor) -> "Given":
        """The noise of some of the images."""
        return Given(self.noise[rows])


@dataclass(frozen=True)
class Peer:
    """Another library's attack: adversarial images, and the noise its random start drew as a share of epsilon."""

    name: str
    attack: Callable[[nn.Module, Tensor, Tensor, float], Tensor]
    noise: Callable[[Tensor, float], Tensor] | None


def peers(name: str) -> list[list[str]]:
    """Rows for one network."""
    model = checkpoints.model(name)
    epsilon = checkpoints.reference(name).epsilon
    pixels, labels = checkpoints.images(name, PEERS_ON)
    return [_row(name, model, pixels, labels, epsilon, peer) for peer in PEERS]


def _row(name: str, model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, peer: Peer) -> list[str]:
    torch.manual_seed(0)
    theirs = peer.attack(model, pixels, labels, epsilon).detach()
    torch.manual_seed(0)
    ours = _ours(model, pixels, labels, epsilon, peer)
    decided = [inference.predict(model, found, DECISION_BATCH).argmax(1) for found in (ours, theirs)]
    shares = [100 * float((guess == labels).float().mean()) for guess in decided]
    return [
        name,
        "fgsm" if peer.noise is None else "pgd",
        peer.name,
        f"{float((ours - theirs).abs().max()):.1e}",
        f"{100 * float((decided[0] == decided[1]).float().mean()):.1f} %",
        f"{shares[0]:.1f}",
        f"{shares[1]:.1f}",
    ]


def _ours(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, peer: Peer) -> Tensor:
    ball = LInf(epsilon)
    if peer.noise is None:
        return fgsm(model, pixels, labels, ball=ball, settings=Fgsm(kind="fgsm"), draws=BatchDraws(torch.Generator()))
    settings = Pgd(kind="pgd", steps=STEPS, step_size=STEP_SIZE, restarts=1, loss="ce", targets=0)
    return pgd(model, pixels, labels, ball=ball, settings=settings, draws=Given(peer.noise(pixels, epsilon)))


def _torchattacks_fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    found: Tensor = torchattacks.FGSM(model, eps=epsilon)(pixels, labels)
    return found


def _foolbox_fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, found, _ = foolbox.attacks.FGSM()(wrapped, pixels, labels, epsilons=epsilon)
    return found  # type: ignore[no-any-return]


def _pgd(attack: libraries.Attack) -> Callable[[nn.Module, Tensor, Tensor, float], Tensor]:
    def run(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        return attack(model, pixels, labels, Climb(epsilon, STEPS, STEP_SIZE, PEERS_ON))  # one batch, so one draw

    return run


def _uniform(pixels: Tensor, epsilon: float) -> Tensor:
    """Both libraries draw their start so, from the global generator."""
    return torch.empty_like(pixels).uniform_(-epsilon, epsilon) / epsilon


PEERS = (
    Peer("torchattacks", _torchattacks_fgsm, None),
    Peer("foolbox", _foolbox_fgsm, None),
    Peer("torchattacks", _pgd(libraries.torchattacks_pgd), _uniform),
    Peer("foolbox", _pgd(libraries.foolbox_pgd), _uniform),
)


if __name__ == "__main__":
    main()

"""Who leads on validation? `python -m benchmarks.contest artifacts/train/mixture.safetensors OTHER.safetensors ...`

Accuracy of networks on clean images and in the worst case of PGD-20 on cross-entropy and on the margin, and the first
network minus each other on the same images. Images are those of the validation split of the prepared data set, epsilon
is that of params.yaml. The test split is not read: recipes are chosen here (docs/contest.md), and judged there once.
"""

import argparse
from pathlib import Path

from torch import Tensor, nn

from advmoe import classifiers, console, machine, paths
from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import Pgd
from advmoe.data import dataset
from advmoe.data.dataset import Split
from advmoe.errors import UserError
from advmoe.evaluation import harness
from advmoe.evaluation.harness import CLEAN, WORST, Target, Terms
from advmoe.evaluation.intervals import Share
from advmoe.evaluation.paired import compare
from advmoe.params import Epsilon, load_section

SEED = 0
ATTACKS = {
    "pgd": Pgd(kind="pgd", steps=20, step_size=0.25, restarts=1, loss="ce", targets=0),
    "pgd-margin": Pgd(kind="pgd", steps=20, step_size=0.25, restarts=1, loss="margin", targets=0),
}
COLUMNS = (
    "network",
    "clean %",
    "PGD-20 %",
    "first minus it, clean",
    "first minus it, PGD-20",
    "only first : only it",
    "p",
)


def main() -> None:
    """Print the table. Exit code 2 for a file that is missing or of other data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, nargs="+", help="artifacts of this project")
    arguments = parser.parse_args()
    machine.prepare_torch()
    try:
        rows = standings(arguments.networks)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    console.table("on validation images", COLUMNS, rows)


def standings(networks: list[Path]) -> list[list[str]]:
    """A row for each network. Raises UserError for a file that is missing, damaged, or trained on other data."""
    data, epsilon = dataset.load(paths.DATASET), load_section("epsilon", Epsilon)
    loaded = {str(path): classifiers.load(path) for path in networks}
    for name, classifier in loaded.items():
        if classifier.header.inputs.get("dataset") != data.sha256:
            raise UserError(f"{name}: was not trained on the images of {paths.DATASET}")
    found = {name: right(name, each.model, data["validation"], epsilon) for name, each in loaded.items()}
    first = found[str(networks[0])]
    return [
        [name, *(_percent(each[kind]) for kind in (CLEAN, WORST)), *_behind(first, each)]
        for name, each in found.items()
    ]


def right(name: str, model: nn.Module, split: Split, epsilon: float) -> dict[str, Tensor]:
    """Which images (N,) a network gets right: clean, under each attack, and in the worst case."""
    place = machine.device()
    target = Target(name, model.to(place), split.pixels().to(place), split.labels.to(place))
    terms = Terms(LInf(epsilon), harness.fixed_seed(SEED), "bfloat16", None, drop_fallen=True)
    measured = harness.measure(target, ATTACKS, terms)
    harness.forget(target, ATTACKS, terms)
    return measured.correct


def _percent(correct_N: Tensor) -> str:
    share = Share.of(correct_N)
    return f"{100 * share.accuracy:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _behind(first: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """How far another network is behind the first."""
    if other is first:
        return ["", "", "", ""]
    clean, worst = (compare(first[kind], other[kind], SEED) for kind in (CLEAN, WORST))
    return [str(clean), str(worst), f"{worst.only_first} : {worst.only_second}", f"{worst.p:.3f}"]


if __name__ == "__main__":
    main()

"""Agreement of our poisoned sets with other implementations. `make bench` runs this in its virtual environment.

- `badnets` against the backdoor attack of the adversarial-robustness-toolbox, per pixel, on scikit-learn's digits.
- `label-flip` against an independent implementation of the definitions in numpy.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from art.attacks.poisoning import PoisoningAttackBackdoor
from art.attacks.poisoning.perturbations import add_single_bd
from sklearn.datasets import load_digits

from advmoe.core import console
from advmoe.runtime.machine import generator
from advmoe.threats.poisoning.badnets import BadNets, badnets
from advmoe.threats.poisoning.label_flip import LabelFlip, PairFlip, RandomFlip, TargetedFlip, label_flip
from advmoe.threats.poisoning.poisoned_set import PoisonedSet

CLASSES, SIZE, TARGET = 10, 2, 0
FLIP_SOURCE, FLIP_TARGET = 4, 9  # classes of the targeted flip
RATES = (0.01, 0.1, 0.5)


def main() -> None:
    """Prints both tables. Exit code 1 on disagreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    images, labels = digits()
    badnets_rows = [badnets_row(images, labels, rate, seed) for rate in RATES]
    flip_rows = [label_flip_row(images, labels, kind, rate, seed) for kind in FLIPS for rate in RATES]
    console.table(
        f"badnets against adversarial-robustness-toolbox, {len(labels)} digits, seed {seed}",
        ["rate", "poisoned", "expected", "pixels that differ", "labels that differ", "clean images touched"],
        badnets_rows,
    )
    console.table(
        f"label-flip against plain numpy, {len(labels)} digits, seed {seed}",
        [
            "flip",
            "rate",
            "flipped",
            "expected",
            "labels that violate the definition",
            "ours, share of pairs",
            "numpy's",
        ],
        flip_rows,
    )
    differs = any(row[1] != row[2] or set(row[3:]) != {"0"} for row in badnets_rows)
    if differs or any(row[2] != row[3] or row[4] != "0" for row in flip_rows):
        parser.exit(1, "error: the poisoned sets of the implementations differ\n")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all digits as uint8 (N, 1, 8, 8), and their labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    levels = np.rint(images.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8)
    return torch.from_numpy(levels), torch.from_numpy(labels.astype(np.int64))


def stamp_corner(images_NHWC: np.ndarray) -> np.ndarray:
    """Applies the toolbox's single-pixel trigger to every pixel of the square, by shifting the images beneath it."""
    for below in range(SIZE):
        for right in range(SIZE):
            moved = np.roll(images_NHWC, (below, right), axis=(1, 2))
            images_NHWC = np.roll(add_single_bd(moved, distance=1, pixel_value=255), (-below, -right), axis=(1, 2))
    return images_NHWC


def badnets_row(images: torch.Tensor, labels: torch.Tensor, rate: float, seed: int) -> list[str]:
    """Returns one row: our attack, and the toolbox's on the images that ours drew."""
    settings = BadNets(kind="badnets", size=SIZE, target=TARGET)
    ours = badnets(images, labels, generator("bench", seed), settings, rate=rate, classes=CLASSES)
    rows = ours.rows.numpy()
    attack = PoisoningAttackBackdoor(stamp_corner)
    chosen = images.numpy()[rows].transpose(0, 2, 3, 1)
    theirs, false_labels = attack.poison(chosen, y=np.full(len(rows), TARGET))
    pixels = int((ours.images.numpy()[rows].transpose(0, 2, 3, 1) != theirs).sum())
    untouched = np.setdiff1d(np.arange(len(labels)), rows)
    touched = int((ours.images.numpy()[untouched] != images.numpy()[untouched]).any(axis=(1, 2, 3)).sum())
    touched += int((ours.labels.numpy()[untouched] != labels.numpy()[untouched]).sum())
    wrong = int((ours.labels.numpy()[rows] != false_labels).sum()) + int((labels.numpy()[rows] == TARGET).sum())
    return [f"{rate:g}", str(len(rows)), str(round(rate * len(labels))), str(pixels), str(wrong), str(touched)]


# ---- independent label noise


def _random(labels: np.ndarray, rate: float, draw: np.random.Generator) -> np.ndarray:
    flipped = labels.copy()
    for row in draw.choice(len(labels), round(rate * len(labels)), replace=False):
        flipped[row] = draw.choice([label for label in range(CLASSES) if label != labels[row]])
    return flipped


def _pair(labels: np.ndarray, rate: float, draw: np.random.Generator) -> np.ndarray:
    flipped = labels.copy()
    for row in draw.choice(len(labels), round(rate * len(labels)), replace=False):
        flipped[row] = 0 if labels[row] == CLASSES - 1 else labels[row] + 1
    return flipped


def _targeted(labels: np.ndarray, rate: float, draw: np.random.Generator) -> np.ndarray:
    flipped, of_source = labels.copy(), np.flatnonzero(labels == FLIP_SOURCE)
    flipped[draw.choice(of_source, round(rate * len(of_source)), replace=False)] = FLIP_TARGET
    return flipped


FLIPS: dict[str, tuple[LabelFlip, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]]] = {
    "random": (RandomFlip(kind="label-flip-random"), _random),
    "pair": (PairFlip(kind="label-flip-pair"), _pair),
    "targeted": (TargetedFlip(kind="label-flip-targeted", source=FLIP_SOURCE, target=FLIP_TARGET), _targeted),
}


def label_flip_row(images: torch.Tensor, labels: torch.Tensor, kind: str, rate: float, seed: int) -> list[str]:
    """Returns one row: the numbers of labels flipped, and of pairs of classes between which labels were flipped."""
    settings, independent = FLIPS[kind]
    ours = label_flip(images, labels, generator("bench", seed), settings, rate=rate, classes=CLASSES)
    theirs = independent(labels.numpy(), rate, np.random.default_rng(seed))
    true = labels.numpy()
    flipped = [int((each != true).sum()) for each in (ours.labels.numpy(), theirs)]
    pairs = [
        len(set(zip(true[each != true], each[each != true], strict=True))) for each in (ours.labels.numpy(), theirs)
    ]
    possible = {"random": CLASSES * (CLASSES - 1), "pair": CLASSES, "targeted": 1}[kind]
    shares = [f"{count} of {possible}" for count in pairs]
    return [kind, f"{rate:g}", str(flipped[0]), str(flipped[1]), str(_count_violations(kind, ours, true)), *shares]


def _count_violations(kind: str, ours: PoisonedSet, true: np.ndarray) -> int:
    """Returns the number of our labels that the definition forbids, and of labels changed outside `rows`."""
    now, rows = ours.labels.numpy(), ours.rows.numpy()
    allowed = {
        "random": now != true,
        "pair": now == (true + 1) % CLASSES,
        "targeted": (now == FLIP_TARGET) & (true == FLIP_SOURCE),
    }[kind]
    changed = np.zeros(len(true), dtype=bool)
    changed[rows] = True
    return int((changed & ~allowed).sum() + (~changed & (now != true)).sum())


if __name__ == "__main__":
    main()

"""Who leads on validation? `python -m benchmarks.contest artifacts/train/mixture.safetensors OTHER.safetensors ...`
prints it, `--presets autoattack adaptive` asks harder, `--save LEDGER.json` keeps it; `python -m benchmarks.contest
--ledger LEDGER.json` prints what was kept, and `--figure FILE.svg` draws it, robust against clean accuracy.

Accuracy of networks on clean images and in the worst case of PGD-20 on cross-entropy and on the margin, and the first
network minus each other on the same images. Images are those of the validation split of the prepared data set, epsilon
is that of params.yaml. The test split is not read: recipes are chosen here (docs/contest.md), and judged there once.
"""

import argparse
import xml.etree.ElementTree as ET  # only what matplotlib has just written is parsed
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import torch
from pydantic import Field, NonNegativeInt, StringConstraints, ValidationError, model_validator
from torch import Tensor, nn

from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.presets import Preset, preset
from advmoe.attacks.registry import AnyAttack
from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, PositiveInt, Settings, explain, load_section
from advmoe.data import dataset
from advmoe.data.dataset import Split
from advmoe.evaluation import harness
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget
from advmoe.models import classifiers
from advmoe.models.mixture import MixtureOfExperts
from advmoe.reporting.report.figures import Disc, discs
from advmoe.reporting.report.html import palette
from advmoe.reporting.report.svg import NAMESPACE
from advmoe.runtime import machine
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Share
from advmoe.statistics.paired_tests import compare
from advmoe.training import flops
from advmoe.training.pretrained_experts import check_trained_on

SEED = 0
ATTACKS: dict[str, AnyAttack] = {
    "pgd": Pgd(kind="pgd", steps=20, step_size=0.25, restarts=1, loss="ce", targets=0),
    "pgd-margin": Pgd(kind="pgd", steps=20, step_size=0.25, restarts=1, loss="margin", targets=0),
}
COLUMNS = (
    "network",
    "training, TFLOP",
    "clean %",
    "robust %",
    "first minus it, clean",
    "first minus it, robust",
    "only first : only it",
    "p",
)
TERA = 1e12
Bits = Annotated[str, StringConstraints(pattern="^[0-9a-f]+$")]


class Standing(Settings):
    """Which images a network gets right, clean and in the worst case, one bit an image in hexadecimal digits, the first
    image first; and the operations of all of its training.
    """

    training_flops: NonNegativeInt
    clean: Bits
    worst: Bits


class Ledger(Settings):
    """What was asked of networks, and how they stand. `dataset`: hash of the prepared images; `images`: the first so
    many of its validation split; `attacks`: their names, which all had to be withstood at `epsilon` (L-inf).
    """

    dataset: str
    epsilon: Epsilon
    images: PositiveInt
    attacks: tuple[str, ...]
    networks: Annotated[dict[str, Standing], Field(min_length=1)]

    @model_validator(mode="after")
    def _about_these_images(self) -> "Ledger":
        for name, each in self.networks.items():
            if max(int(each.clean, 16), int(each.worst, 16)) >> self.images:
                raise ValueError(f"networks.{name}: tells of more than {self.images} images")
        return self

    def correct(self, name: str) -> dict[str, Tensor]:
        """Which images (N,) the network gets right, clean and in the worst case."""
        each = self.networks[name]
        return {CLEAN: _unpacked(each.clean, self.images), WORST: _unpacked(each.worst, self.images)}

    def only(self, words: list[str] | None) -> "Ledger":
        """Those networks of which a word is the first, or all. Raises UserError for a word that is none's."""
        chosen = {name: each for name, each in self.networks.items() if words is None or name.split(" ")[0] in words}
        unknown = set(words or ()) - {name.split(" ")[0] for name in chosen}
        if unknown:
            raise UserError(f"--only: there is no network {min(unknown)}; there are {', '.join(self.networks)}")
        return self.model_copy(update={"networks": chosen})


def main() -> None:
    """Print the table. Exit code 2 for a file that is missing or of other data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, nargs="*", help="artifacts of this project")
    parser.add_argument("--ledger", type=Path, help="what was kept, instead of networks")
    parser.add_argument(
        "--presets", nargs="+", default=(), choices=get_args(Preset), help="sets of attacks after PGD-20"
    )
    parser.add_argument("--images", type=int, help="of the validation split, the first so many")
    parser.add_argument("--save", type=Path, help="keep which images each network gets right")
    parser.add_argument("--figure", type=Path, help="an SVG of robust against clean accuracy")
    parser.add_argument("--only", nargs="+", help="draw those networks alone whose names begin with one of these words")
    arguments = parser.parse_args()
    if bool(arguments.networks) == bool(arguments.ledger):
        parser.error("either networks or --ledger")
    if arguments.ledger and (arguments.presets or arguments.images is not None):
        parser.error("--presets and --images are asked of networks; what is kept in --ledger was asked before")
    if arguments.only and not arguments.figure:
        parser.error("--only chooses what --figure draws")
    if arguments.images is not None and arguments.images < 1:
        parser.error("--images is at least 1")
    machine.prepare_torch()
    try:
        asked = (arguments.networks, arguments.presets, arguments.images)
        found = read(arguments.ledger) if arguments.ledger else measured(*asked)
        drawn = figure(found.only(arguments.only)) if arguments.figure else ""
        console.table(f"on {found.images} validation images, {', '.join(found.attacks)}", COLUMNS, standings(found))
        if arguments.save:
            files.write_json(arguments.save, found.model_dump(mode="json"))
        if arguments.figure:
            files.write_text(arguments.figure, drawn)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def measured(networks: list[Path], sets: Sequence[Preset] = (), images: int | None = None) -> Ledger:
    """Each network on the validation split, or on its first images, in the worst case of PGD-20 and these sets.

    Raises UserError for a file that is missing, damaged, or trained on other data.
    """
    data, epsilon = dataset.load(paths.DATASET), load_section("epsilon", Epsilon)
    loaded = {path: classifiers.load(path) for path in networks}
    for path, classifier in loaded.items():
        check_trained_on(classifier, path, data)
    costs = {path: flops.prior_flops(path, classifier) for path, classifier in loaded.items()}
    split = data["validation"].first(images or len(data["validation"]))
    found = {path: right(str(path), each.model, split, epsilon, sets) for path, each in loaded.items()}
    return Ledger(
        dataset=data.sha256,
        epsilon=epsilon,
        images=len(split),
        attacks=tuple(dict.fromkeys(name for each in found.values() for name in each if name not in (CLEAN, WORST))),
        networks={
            str(path): Standing(training_flops=costs[path], clean=packed(each[CLEAN]), worst=packed(each[WORST]))
            for path, each in found.items()
        },
    )


def read(ledger: Path) -> Ledger:
    """What `--save` kept. Raises UserError for a file that is missing or is no ledger."""
    try:
        return Ledger.model_validate_json(ledger.read_bytes())
    except OSError as error:
        raise UserError(f"{ledger}: {error.strerror or error}") from error
    except ValidationError as error:
        raise UserError(f"{ledger}: is no ledger: {explain(error, {})}") from error


def standings(found: Ledger) -> list[list[str]]:
    """A row for each network; the first is compared with each other."""
    correct = {name: found.correct(name) for name in found.networks}
    first = next(iter(correct.values()))
    return [
        [
            name,
            f"{found.networks[name].training_flops / TERA:.1f}",
            *(str(Share.of(each[kind])) for kind in (CLEAN, WORST)),
            *_behind(first, each),
        ]
        for name, each in correct.items()
    ]


def figure(found: Ledger) -> str:
    """Robust against clean accuracy as an SVG that stands alone, in light and dark; area: operations of training."""
    rows = [_disc(found, name, place) for place, name in enumerate(found.networks)]
    axes = ("clean accuracy, %", f"accuracy under {', '.join(found.attacks)}, %")
    said = "Accuracy on validation images, with 95 % intervals; area: operations of training."
    root = ET.fromstring(discs("contest", "The contest", said, rows, axes_labels=axes, unit="FLOP").svg)  # noqa: S314
    style = ET.Element(f"{{{NAMESPACE}}}style")
    # whoever opens the file alone has no style sheet of the report's
    style.text = f"{palette()}svg {{ color: var(--text); background: var(--surface); }}"
    root.insert(0, style)
    ET.register_namespace("", NAMESPACE)
    return ET.tostring(root, encoding="unicode")


def _disc(found: Ledger, name: str, series: int) -> Disc:
    correct = found.correct(name)
    return Disc(name, Share.of(correct[CLEAN]), Share.of(correct[WORST]), found.networks[name].training_flops, series)


def packed(correct_N: Tensor) -> str:
    """Bits of which images are right, as a ledger keeps them."""
    bits = "".join("01"[bit] for bit in correct_N.int().tolist())
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def _unpacked(digits: str, images: int) -> Tensor:
    bits = f"{int(digits, 16):0{images}b}"
    return torch.tensor([bit == "1" for bit in bits])


def right(name: str, model: nn.Module, split: Split, epsilon: float, sets: Sequence[Preset] = ()) -> dict[str, Tensor]:
    """Which images (N,) a network gets right: clean, under each attack, and in the worst case."""
    place = machine.device()
    target = EvaluationTarget(name, model.to(place), split.pixels().to(place), split.labels.to(place))
    terms = EvaluationConfig(LInf(epsilon), machine.evaluation_seed(SEED), "bfloat16", None, drop_fallen=True)
    attacks = dict(ATTACKS)
    for each in sets:
        attacks |= preset(each, (), has_gate=isinstance(model, MixtureOfExperts))
    measured = harness.evaluate(target, attacks, terms)
    harness.clear_resume_state(target, attacks, terms)
    return measured.correct


def _behind(first: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """How far another network is behind the first."""
    if other is first:
        return ["", "", "", ""]
    clean, worst = (compare(first[kind], other[kind], SEED) for kind in (CLEAN, WORST))
    return [str(clean), str(worst), f"{worst.only_first} : {worst.only_second}", f"{worst.p:.3f}"]


if __name__ == "__main__":
    main()

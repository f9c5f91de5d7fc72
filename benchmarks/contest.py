"""Comparison of networks on the validation split: `python -m benchmarks.contest artifacts/train/mixture.safetensors
OTHER.safetensors ...` prints a table. `--presets autoattack adaptive` adds attacks, `--save LEDGER.json` saves the
decisions, `--ledger LEDGER.json` prints saved ones, `--figure FILE.svg` plots robust against clean accuracy.

The table shows the accuracy on clean images and in the worst case of PGD-20 with cross-entropy and margin loss, and the
difference of the first network to each other one on the same images. Images are those of the validation split of the
prepared data set, epsilon is that of params.yaml. The test split is not read: training configurations are selected here
(docs/contest.md), and evaluated on test once.
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
from advmoe.attacks.registry import AttackSettings
from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import Epsilon, PositiveInt, Settings, format_validation_error, load_section
from advmoe.data import dataset
from advmoe.data.dataset import Split
from advmoe.evaluation import harness
from advmoe.evaluation.harness import EvaluationConfig, EvaluationTarget
from advmoe.models import classifiers
from advmoe.models.mixture import MixtureOfExperts
from advmoe.reporting.report.figures import Bubble, bubble_chart
from advmoe.reporting.report.html import palette
from advmoe.reporting.report.svg import NAMESPACE
from advmoe.runtime import machine
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import compare_paired
from advmoe.training import flops
from advmoe.training.pretrained_experts import check_trained_on

SEED = 0
ATTACKS: dict[str, AttackSettings] = {
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
HexBits = Annotated[str, StringConstraints(pattern="^[0-9a-f]+$")]


class NetworkResult(Settings):
    """Correctness of each image, clean and in the worst case, as one bit per image in hexadecimal digits, the first
    image first; and the FLOPs of all training.
    """

    training_flops: NonNegativeInt
    clean: HexBits
    worst: HexBits


class ContestRecord(Settings):
    """Results of several networks. `dataset`: hash of the prepared data set; `images`: number of images, the first of
    its validation split; `attacks`: names of the attacks of the worst case, with L-inf radius `epsilon`.
    """

    dataset: str
    epsilon: Epsilon
    images: PositiveInt
    attacks: tuple[str, ...]
    networks: Annotated[dict[str, NetworkResult], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_number_of_bits(self) -> "ContestRecord":
        for name, result in self.networks.items():
            if max(int(result.clean, 16), int(result.worst, 16)) >> self.images:
                raise ValueError(f"networks.{name}: has bits for more than {self.images} images")
        return self

    def correct(self, name: str) -> dict[str, Tensor]:
        """Returns which images are classified correctly, clean and in the worst case, as bool (N,)."""
        result = self.networks[name]
        return {CLEAN: _unpack_bits(result.clean, self.images), WORST: _unpack_bits(result.worst, self.images)}

    def select(self, first_words: list[str] | None) -> "ContestRecord":
        """Returns the networks whose names start with one of these words; None for all. Raises UserError for an unknown
        word.
        """
        chosen = {
            name: result
            for name, result in self.networks.items()
            if first_words is None or name.split(" ")[0] in first_words
        }
        unknown = set(first_words or ()) - {name.split(" ")[0] for name in chosen}
        if unknown:
            raise UserError(f"--only: there is no network {min(unknown)}; there are {', '.join(self.networks)}")
        return self.model_copy(update={"networks": chosen})


def main() -> None:
    """Prints the table. Exit code 2 for a file that is missing or of other data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, nargs="*", help="artifacts of networks")
    parser.add_argument("--ledger", type=Path, help="decisions saved by --save, instead of networks")
    parser.add_argument(
        "--presets", nargs="+", default=(), choices=get_args(Preset), help="presets of attacks in addition to PGD-20"
    )
    parser.add_argument("--images", type=int, help="number of validation images, from the first")
    parser.add_argument("--save", type=Path, help="save which images each network classifies correctly")
    parser.add_argument("--figure", type=Path, help="SVG plot of robust against clean accuracy")
    parser.add_argument("--only", nargs="+", help="plot only the networks whose names start with one of these words")
    arguments = parser.parse_args()
    if bool(arguments.networks) == bool(arguments.ledger):
        parser.error("either networks or --ledger is required")
    if arguments.ledger and (arguments.presets or arguments.images is not None):
        parser.error("--presets and --images cannot be combined with --ledger")
    if arguments.only and not arguments.figure:
        parser.error("--only needs --figure")
    if arguments.images is not None and arguments.images < 1:
        parser.error("--images must be at least 1")
    machine.prepare_torch()
    try:
        options = (arguments.networks, arguments.presets, arguments.images)
        record = read_record(arguments.ledger) if arguments.ledger else evaluate_networks(*options)
        svg = render_figure(record.select(arguments.only)) if arguments.figure else ""
        console.table(f"on {record.images} validation images, {', '.join(record.attacks)}", COLUMNS, table_rows(record))
        if arguments.save:
            files.write_json(arguments.save, record.model_dump(mode="json"))
        if arguments.figure:
            files.write_text(arguments.figure, svg)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def evaluate_networks(networks: list[Path], presets: Sequence[Preset] = (), images: int | None = None) -> ContestRecord:
    """Evaluates networks on the first `images` validation images (None: all) with PGD-20 and `presets`.

    Raises UserError for a file that is missing, damaged, or trained on other data.
    """
    data, epsilon = dataset.load(paths.DATASET), load_section("epsilon", Epsilon)
    loaded = {path: classifiers.load(path) for path in networks}
    for path, classifier in loaded.items():
        check_trained_on(classifier, path, data)
    costs = {path: flops.prior_flops(path, classifier) for path, classifier in loaded.items()}
    split = data["validation"].first(images or len(data["validation"]))
    correct = {path: evaluate_network(str(path), each.model, split, epsilon, presets) for path, each in loaded.items()}
    return ContestRecord(
        dataset=data.sha256,
        epsilon=epsilon,
        images=len(split),
        attacks=tuple(dict.fromkeys(name for each in correct.values() for name in each if name not in (CLEAN, WORST))),
        networks={
            str(path): NetworkResult(
                training_flops=costs[path], clean=pack_bits(each[CLEAN]), worst=pack_bits(each[WORST])
            )
            for path, each in correct.items()
        },
    )


def read_record(ledger: Path) -> ContestRecord:
    """Reads a file written by `--save`. Raises UserError for a missing or invalid file."""
    try:
        return ContestRecord.model_validate_json(ledger.read_bytes())
    except OSError as error:
        raise UserError(f"{ledger}: {error.strerror or error}") from error
    except ValidationError as error:
        raise UserError(f"{ledger}: is not a ledger: {format_validation_error(error, {})}") from error


def table_rows(record: ContestRecord) -> list[list[str]]:
    """Returns a row for each network, with its difference to the first."""
    correct = {name: record.correct(name) for name in record.networks}
    first = next(iter(correct.values()))
    return [
        [
            name,
            f"{record.networks[name].training_flops / TERA:.1f}",
            *(str(Proportion.from_mask(each[kind])) for kind in (CLEAN, WORST)),
            *_comparison_cells(first, each),
        ]
        for name, each in correct.items()
    ]


def render_figure(record: ContestRecord) -> str:
    """Returns a standalone SVG of robust against clean accuracy, for light and dark mode; area: FLOPs of training."""
    rows = [_disc(record, name, series) for series, name in enumerate(record.networks)]
    axes = ("clean accuracy, %", f"accuracy under {', '.join(record.attacks)}, %")
    caption = "Accuracy on validation images, with 95 % intervals; area: operations of training."
    root = ET.fromstring(bubble_chart("contest", "The contest", caption, rows, axes_labels=axes, unit="FLOP").svg)  # noqa: S314
    style = ET.Element(f"{{{NAMESPACE}}}style")
    # a standalone file lacks the style sheet of the report
    style.text = f"{palette()}svg {{ color: var(--text); background: var(--surface); }}"
    root.insert(0, style)
    ET.register_namespace("", NAMESPACE)
    return ET.tostring(root, encoding="unicode")


def _disc(record: ContestRecord, name: str, series: int) -> Bubble:
    correct = record.correct(name)
    return Bubble(
        name,
        Proportion.from_mask(correct[CLEAN]),
        Proportion.from_mask(correct[WORST]),
        record.networks[name].training_flops,
        series,
    )


def pack_bits(correct_N: Tensor) -> str:
    """Packs bool (N,) into hexadecimal digits, the first image first."""
    bits = "".join("01"[bit] for bit in correct_N.int().tolist())
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def _unpack_bits(digits: str, images: int) -> Tensor:
    bits = f"{int(digits, 16):0{images}b}"
    return torch.tensor([bit == "1" for bit in bits])


def evaluate_network(
    name: str, model: nn.Module, split: Split, epsilon: float, presets: Sequence[Preset] = ()
) -> dict[str, Tensor]:
    """Returns which images are classified correctly, as bool (N,): clean, under each attack, and in the worst case."""
    device = machine.device()
    target = EvaluationTarget(name, model.to(device), split.pixels().to(device), split.labels.to(device))
    config = EvaluationConfig(LInf(epsilon), machine.evaluation_seed(SEED), "bfloat16", None, drop_fallen=True)
    attacks = dict(ATTACKS)
    for kind in presets:
        attacks |= preset(kind, (), has_gate=isinstance(model, MixtureOfExperts))
    result = harness.evaluate(target, attacks, config)
    harness.clear_resume_state(target, attacks, config)
    return result.correct


def _comparison_cells(first: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Returns the differences of the first network to another one."""
    if other is first:
        return ["", "", "", ""]
    clean, worst = (compare_paired(first[kind], other[kind], SEED) for kind in (CLEAN, WORST))
    return [str(clean), str(worst), f"{worst.only_first} : {worst.only_second}", f"{worst.p:.3f}"]


if __name__ == "__main__":
    main()

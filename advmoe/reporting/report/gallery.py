"""The section of examples: test images with adversarial versions, predictions and gate weights.

Shapes: N images, C channel, H/W pixels, K classes, E experts.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from advmoe.core import artifacts, paths
from advmoe.evaluation.summary import MIXTURE
from advmoe.models import classifiers, inference
from advmoe.models.classifiers import Classifier
from advmoe.models.gate_statistics import gate_weights
from advmoe.models.mixture import MixtureOfExperts
from advmoe.reporting.report.document import (
    Block,
    Cell,
    Example,
    Gallery,
    Paragraph,
    Picture,
    Section,
    Table,
    row,
    table,
)
from advmoe.reporting.report.formats import percent
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.decisions import CLEAN, WORST

KIND = "adversarial-examples"
TITLE = "Adversarial examples"


@dataclass(frozen=True)
class SelectedImage:
    """The position of an image in the test split, and the attack whose result is shown."""

    position: int
    attack: str
    misclassified: bool


@dataclass(frozen=True)
class ExampleData:
    """The data of the examples, `predicted` and `weights` for clean and adversarial images.

    Images (N, C, H, W) in [0, 1], index, labels and predictions (N,), weights (N, E).
    """

    selected: Sequence[SelectedImage]
    index: Tensor
    labels: Tensor
    clean: Tensor
    adversarial: Tensor
    predicted: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    epsilon: float


def section(sources: Sources, root: Path, count: int) -> Section:
    """Shows `count` examples from the artifacts under `root`, a third of them robust, or why there are none."""
    files = [root / paths.ADVERSARIAL, root / paths.MIXTURE]
    missing = [str(path.relative_to(root)) for path in files if not path.is_file()]
    if missing or MIXTURE not in sources.models:
        what = f"{' and '.join(missing)} missing" if missing else "no evaluation"
        return _note(f"No adversarial examples: {what}; run `dvc repro evaluate` or `dvc pull`.")
    examples, mixture = artifacts.load(files[0], KIND), classifiers.load(files[1])
    if not _same_run(sources, examples, mixture):
        return _note("No adversarial examples: the artifacts belong to another run.")
    if sources.models[MIXTURE]["accuracy"][WORST] is None:
        return _note("No adversarial examples: withheld after a failed check.")
    order = list(sources.models[MIXTURE]["attacks"])
    return Section("examples", TITLE, tuple(_blocks(examples, mixture, order, count)))


def _note(sentence: str) -> Section:
    return Section("examples", TITLE, (Paragraph(sentence),))


def _same_run(sources: Sources, examples: artifacts.Artifact, mixture: Classifier) -> bool:
    """Whether the images were attacked on this mixture, and give the accuracies of the snapshot."""
    accuracy = sources.models[MIXTURE]["accuracy"]
    decisions = {kind: examples.tensors.get(f"{MIXTURE}.{kind}.correct") for kind in (CLEAN, WORST)}
    equal = all(
        accuracy[kind] is None or (correct is not None and int(correct.sum()) == accuracy[kind]["correct"])
        for kind, correct in decisions.items()
    )
    return equal and examples.header.inputs.get(MIXTURE) == mixture.header.sha256


def _blocks(examples: artifacts.Artifact, mixture: Classifier, order: Sequence[str], count: int) -> Iterable[Block]:
    robust = count // 3
    selected = select_images(examples.tensors, order, count - robust, robust)
    if not selected:
        yield Paragraph("No examples: the mixture classifies no clean image correctly.")
        return
    data = _example_data(selected, examples, mixture)
    yield Paragraph(
        f"{sum(each.misclassified for each in selected)} test images that are misclassified under attack and "
        f"{sum(not each.misclassified for each in selected)} that are classified correctly under every attack: the "
        "first ones in order, of different classes where possible. Misclassified images are shown under the first "
        "successful attack, the others under the attack with the most successes. The perturbation is magnified: "
        f"mid-grey is no change, black and white are -{data.epsilon:g} and +{data.epsilon:g}."
    )
    about = mixture.about
    names = about.architecture.experts if isinstance(about.architecture, classifiers.MixtureArchitecture) else ()
    yield Gallery(tuple(_example(data, index, about.facts.class_names, names) for index in range(len(selected))))


def select_images(
    tensors: Mapping[str, Tensor], order: Sequence[str], misclassified: int, robust: int
) -> list[SelectedImage]:
    """Selects images that an attack made misclassified, and images robust to all attacks; deterministic.

    All are classified correctly when clean, and are of different classes where possible. `order`: the attacks in the
    order they were run.
    """
    attacks = [name for name in order if f"{MIXTURE}.{name}.images" in tensors]
    if not attacks:
        return []
    success_AN = torch.stack([_attack_succeeded(tensors, attack) for attack in attacks])
    clean_N, worst_N = (tensors[f"{MIXTURE}.{kind}.correct"].bool() for kind in (CLEAN, WORST))
    labels = tensors["labels"].tolist()
    strongest = attacks[int(success_AN.sum(dim=1).argmax())]
    broken = _spread_over_classes((clean_N & success_AN.any(dim=0)).nonzero().flatten().tolist(), labels, misclassified)
    withstanding = _spread_over_classes((clean_N & worst_N).nonzero().flatten().tolist(), labels, robust)
    first = success_AN.int().argmax(dim=0)
    return [SelectedImage(position, attacks[int(first[position])], True) for position in broken] + [
        SelectedImage(position, strongest, False)
        for position in withstanding
        if _was_attacked(tensors, strongest, position)
    ]


def _attack_succeeded(tensors: Mapping[str, Tensor], attack: str) -> Tensor:
    attacked, correct = (tensors[f"{MIXTURE}.{attack}.{what}"].bool() for what in ("attacked", "correct"))
    # attacks on fewer images may have stored fewer decisions
    success = torch.zeros(len(tensors["labels"]), dtype=torch.bool)
    success[: len(correct)] = attacked[: len(correct)] & ~correct
    return success


def _was_attacked(tensors: Mapping[str, Tensor], attack: str, position: int) -> bool:
    attacked = tensors[f"{MIXTURE}.{attack}.attacked"]
    return position < len(attacked) and bool(attacked[position])


def _spread_over_classes(positions: Sequence[int], labels: Sequence[int], count: int) -> list[int]:
    """Returns `count` positions: the first of every class, then the second of every class, and so on."""
    seen: dict[int, int] = {}
    ranked = []
    for position in positions:
        rank = seen[labels[position]] = seen.get(labels[position], -1) + 1
        ranked.append((rank, position))
    return [position for _, position in sorted(ranked)[:count]]


def _example_data(selected: Sequence[SelectedImage], examples: artifacts.Artifact, mixture: Classifier) -> ExampleData:
    tensors, model = examples.tensors, mixture.model
    assert isinstance(model, MixtureOfExperts)
    positions = torch.tensor([each.position for each in selected])
    clean = _pixels(tensors["images"][positions])
    adversarial = _pixels(torch.stack([tensors[f"{MIXTURE}.{each.attack}.images"][each.position] for each in selected]))
    predicted = [inference.predict(model, images, len(selected)).argmax(1) for images in (clean, adversarial)]
    weights = [gate_weights(model, images) for images in (clean, adversarial)]
    labels, index = tensors["labels"][positions], tensors["index"][positions]
    epsilon = float(examples.header.about["epsilon"])
    return ExampleData(
        selected, index, labels, clean, adversarial, (predicted[0], predicted[1]), (weights[0], weights[1]), epsilon
    )


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _example(data: ExampleData, index: int, classes: Sequence[str], experts: Sequence[str]) -> Example:
    image, (clean_N, adversarial_N) = data.selected[index], data.predicted
    label, clean, adversarial = (classes[int(each[index])] for each in (data.labels, clean_N, adversarial_N))
    change = data.adversarial[index] - data.clean[index]
    outcome = f"misclassified under {image.attack}" if image.misclassified else f"robust, shown under {image.attack}"
    title = f"Image {int(data.index[index])}: {outcome}"
    pictures = (
        _picture("clean", f"Test image of class {label}", data.clean[index]),
        _picture("perturbation", f"Perturbation by {image.attack}", 0.5 + change / (2 * max(data.epsilon, 1e-9))),
        _picture("adversarial", f"The image under {image.attack}, predicted as {adversarial}", data.adversarial[index]),
    )
    facts = (
        ("true class", label),
        ("predicted, clean", clean),
        ("predicted, adversarial", adversarial),
        ("largest change", f"{float(change.abs().max()):.3f} of the pixel range"),
    )
    return Example(title, image.misclassified, pictures, facts, _weights(data, index, experts))


def _weights(data: ExampleData, index: int, experts: Sequence[str]) -> Table:
    clean, adversarial = (each[index].tolist() for each in data.weights)
    rows = [
        row([name, Cell(percent(before), heat=before), Cell(percent(after), heat=after)])
        for name, before, after in zip(experts, clean, adversarial, strict=True)
    ]
    return table("Gate weights for this image, %", ["expert", "clean", "adversarial"], rows)


def _picture(title: str, description: str, image_CHW: Tensor) -> Picture:
    return Picture(title, description, to_uri(image_CHW), pixelated=True)


def to_uri(image_CHW: Tensor) -> str:
    """Encodes an image (C, H, W) in [0, 1] as a PNG data URI: RGB for three channels, else the first one in grey."""
    levels: Any = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    picture = Image.fromarray(levels.transpose(1, 2, 0) if len(levels) == 3 else levels[0])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

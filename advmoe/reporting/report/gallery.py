"""A handful of test images that fell to an attack on the mixture or withstood all: chosen by rule, shown with the gate.

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
class Chosen:
    """An image's place in the test, and the attack whose image of it is shown."""

    place: int
    attack: str
    fell: bool


@dataclass(frozen=True)
class Shown:
    """All that the examples are made from: images (N, C, H, W) in [0, 1], predictions (N,), weights (N, E)."""

    chosen: Sequence[Chosen]
    index: Tensor
    labels: Tensor
    clean: Tensor
    attacked: Tensor
    predicted: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    epsilon: float


def section(sources: Sources, root: Path, count: int) -> Section:
    """`count` examples from the artifacts under `root`, a third of which withstood; a sentence where there are none."""
    files = [root / paths.ADVERSARIAL, root / paths.MIXTURE]
    absent = [str(path.relative_to(root)) for path in files if not path.is_file()]
    if absent or MIXTURE not in sources.models:
        what = f"{' and '.join(absent)} not here" if absent else "nothing was evaluated"
        return _only(f"Adversarial examples cannot be shown: {what}; `dvc repro evaluate` or `dvc pull` brings them.")
    examples, mixture = artifacts.load(files[0], KIND), classifiers.load(files[1])
    if not _same_run(sources, examples, mixture):
        return _only("Adversarial examples are not shown: the artifacts that lie here belong to another run.")
    if sources.models[MIXTURE]["accuracy"][WORST] is None:
        return _only("Adversarial examples are not shown: a failed check says that these attacks prove nothing.")
    order = list(sources.models[MIXTURE]["attacks"])
    return Section("examples", TITLE, tuple(_blocks(examples, mixture, order, count)))


def _only(sentence: str) -> Section:
    return Section("examples", TITLE, (Paragraph(sentence),))


def _same_run(sources: Sources, examples: artifacts.Artifact, mixture: Classifier) -> bool:
    """Whether the images were made against this mixture, and give the accuracies of the record."""
    known = sources.models[MIXTURE]["accuracy"]
    counted = {kind: examples.tensors.get(f"{MIXTURE}.{kind}.correct") for kind in (CLEAN, WORST)}
    alike = all(
        known[kind] is None or (correct is not None and int(correct.sum()) == known[kind]["correct"])
        for kind, correct in counted.items()
    )
    return alike and examples.header.inputs.get(MIXTURE) == mixture.header.sha256


def _blocks(examples: artifacts.Artifact, mixture: Classifier, order: Sequence[str], count: int) -> Iterable[Block]:
    withstood = count // 3
    chosen = choose(examples.tensors, order, count - withstood, withstood)
    if not chosen:
        yield Paragraph("There is nothing to show: the mixture gets no clean image right.")
        return
    shown = _look(chosen, examples, mixture)
    yield Paragraph(
        f"{sum(each.fell for each in chosen)} test images that fell and {sum(not each.fell for each in chosen)} that "
        "withstood every attack: not picked by eye but the first ones, of different classes as far as there are such. "
        "An image that fell is shown as changed by the first attack that it fell to, in the order they were run, one "
        "that withstood as changed by the attack that brought down most others. The perturbation is magnified: "
        f"mid-grey is no change, black and white are -{shown.epsilon:g} and +{shown.epsilon:g}."
    )
    about = mixture.about
    names = about.architecture.experts if isinstance(about.architecture, classifiers.Mixture) else ()
    yield Gallery(tuple(_example(shown, at, about.facts.class_names, names) for at in range(len(chosen))))


def choose(tensors: Mapping[str, Tensor], order: Sequence[str], fell: int, withstood: int) -> list[Chosen]:
    """`fell` images that an attack brought down and `withstood` that none did, the same ones each time.

    Both are right when clean; as far as possible every one is of another class. `order`: of the attacks as they were
    run, which safetensors, sorted by name, does not tell.
    """
    attacks = [name for name in order if f"{MIXTURE}.{name}.images" in tensors]
    if not attacks:
        return []
    down_AN = torch.stack([_down(tensors, attack) for attack in attacks])
    clean_N, worst_N = (tensors[f"{MIXTURE}.{kind}.correct"].bool() for kind in (CLEAN, WORST))
    labels = tensors["labels"].tolist()
    strongest = attacks[int(down_AN.sum(dim=1).argmax())]
    fallen = _varied((clean_N & down_AN.any(dim=0)).nonzero().flatten().tolist(), labels, fell)
    standing = _varied((clean_N & worst_N).nonzero().flatten().tolist(), labels, withstood)
    first = down_AN.int().argmax(dim=0)
    return [Chosen(place, attacks[int(first[place])], True) for place in fallen] + [
        Chosen(place, strongest, False) for place in standing if _was_attacked(tensors, strongest, place)
    ]


def _down(tensors: Mapping[str, Tensor], attack: str) -> Tensor:
    attacked, correct = (tensors[f"{MIXTURE}.{attack}.{what}"].bool() for what in ("attacked", "correct"))
    # attacks that met fewer images may have kept fewer decisions
    full = torch.zeros(len(tensors["labels"]), dtype=torch.bool)
    full[: len(correct)] = attacked[: len(correct)] & ~correct
    return full


def _was_attacked(tensors: Mapping[str, Tensor], attack: str, place: int) -> bool:
    attacked = tensors[f"{MIXTURE}.{attack}.attacked"]
    return place < len(attacked) and bool(attacked[place])


def _varied(places: Sequence[int], labels: Sequence[int], count: int) -> list[int]:
    """The first places of every class, then the next ones, until there are `count`."""
    seen: dict[int, int] = {}
    ranked = []
    for place in places:
        rank = seen[labels[place]] = seen.get(labels[place], -1) + 1
        ranked.append((rank, place))
    return [place for _, place in sorted(ranked)[:count]]


def _look(chosen: Sequence[Chosen], examples: artifacts.Artifact, mixture: Classifier) -> Shown:
    tensors, model = examples.tensors, mixture.model
    assert isinstance(model, MixtureOfExperts)
    places = torch.tensor([each.place for each in chosen])
    clean = _pixels(tensors["images"][places])
    attacked = _pixels(torch.stack([tensors[f"{MIXTURE}.{each.attack}.images"][each.place] for each in chosen]))
    seen = [inference.predict(model, images, len(chosen)).argmax(1) for images in (clean, attacked)]
    weights = [gate_weights(model, images) for images in (clean, attacked)]
    labels, index = tensors["labels"][places], tensors["index"][places]
    epsilon = float(examples.header.about["epsilon"])
    return Shown(chosen, index, labels, clean, attacked, (seen[0], seen[1]), (weights[0], weights[1]), epsilon)


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _example(shown: Shown, at: int, classes: Sequence[str], experts: Sequence[str]) -> Example:
    chosen, (before, after) = shown.chosen[at], shown.predicted
    truth, seen, then = (classes[int(each[at])] for each in (shown.labels, before, after))
    change = shown.attacked[at] - shown.clean[at]
    fate = f"fell to {chosen.attack}" if chosen.fell else f"withstood all attacks, here {chosen.attack}"
    title = f"Image {int(shown.index[at])} {fate}"
    pictures = (
        _picture("clean", f"Test image of class {truth}", shown.clean[at]),
        _picture("perturbation", f"Perturbation by {chosen.attack}", 0.5 + change / (2 * max(shown.epsilon, 1e-9))),
        _picture("adversarial", f"The image after {chosen.attack}, seen as {then}", shown.attacked[at]),
    )
    facts = (
        ("true class", truth),
        ("answer, clean", seen),
        ("answer, attacked", then),
        ("largest change", f"{float(change.abs().max()):.3f} of the pixel range"),
    )
    return Example(title, chosen.fell, pictures, facts, _weights(shown, at, experts))


def _weights(shown: Shown, at: int, experts: Sequence[str]) -> Table:
    clean, attacked = (each[at].tolist() for each in shown.weights)
    rows = [
        row([name, Cell(percent(before), heat=before), Cell(percent(after), heat=after)])
        for name, before, after in zip(experts, clean, attacked, strict=True)
    ]
    return table("Gate weights for this image, %", ["expert", "clean", "attacked"], rows)


def _picture(title: str, description: str, image_CHW: Tensor) -> Picture:
    return Picture(title, description, to_uri(image_CHW), pixelated=True)


def to_uri(image_CHW: Tensor) -> str:
    """An image in [0, 1] as a PNG data URI: in colour with three channels, else its first channel in grey."""
    levels: Any = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    picture = Image.fromarray(levels.transpose(1, 2, 0) if len(levels) == 3 else levels[0])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

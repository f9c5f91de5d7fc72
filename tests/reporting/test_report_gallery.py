"""The gallery: selection of images, contents, and when it is empty.

Shapes: N images, C channel, H/W pixels.
"""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_report import made_up, share
from torch import Tensor

from advmoe.core import artifacts, paths
from advmoe.core.errors import UserError
from advmoe.core.snapshots import CURRENT_FOLDER
from advmoe.data import dataset
from advmoe.models import classifiers
from advmoe.reporting.report import gallery
from advmoe.reporting.report.content import build_content
from advmoe.reporting.report.document import Gallery, Section
from advmoe.reporting.report.html import render_html
from advmoe.reporting.report.sources import Sources

ORDER = ("weak", "strong")  # as they were run; by name it would be the other way round
LABELS = [0, 0, 1, 1, 2, 2, 3, 3]
WEAK = [True, True, True, False, True, True, True, True]  # which images stay correct
STRONG = [False, True, False, False, False, True, True, True]


def decided(images_NCHW: Tensor) -> dict[str, Tensor]:
    """Eight images, all but the last right when clean, attacked twice."""
    clean = torch.tensor([True] * 7 + [False])
    tensors = {"images": images_NCHW, "labels": torch.tensor(LABELS), "index": torch.arange(100, 108)}
    tensors["mixture.clean.correct"] = clean
    right = {"weak": torch.tensor(WEAK), "strong": torch.tensor(STRONG)}
    for name, withstood in right.items():
        tensors[f"mixture.{name}.correct"] = withstood & clean
        tensors[f"mixture.{name}.attacked"] = clean
        tensors[f"mixture.{name}.predicted"] = torch.tensor(LABELS)
        tensors[f"mixture.{name}.images"] = (images_NCHW.float() / 255 + 0.05).clamp(0, 1)
    tensors["mixture.worst.correct"] = right["weak"] & right["strong"] & clean
    return tensors


def test_the_selection_is_deterministic_and_varied() -> None:
    tensors = decided(torch.zeros(8, 1, 8, 8, dtype=torch.uint8))
    chosen = gallery.select_images(tensors, ORDER, misclassified=3, robust=2)
    assert [(each.position, each.attack, each.misclassified) for each in chosen] == [
        (0, "strong", True),  # the first misclassified of each class, under the first successful attack
        (2, "strong", True),
        (4, "strong", True),
        (1, "strong", False),  # the first robust of each class, under the attack with the most successes
        (5, "strong", False),
    ]
    assert gallery.select_images(tensors, ORDER, misclassified=3, robust=2) == chosen


def test_a_class_comes_again_when_there_are_no_others() -> None:
    tensors = decided(torch.zeros(8, 1, 8, 8, dtype=torch.uint8))
    selected = gallery.select_images(tensors, ORDER, misclassified=9, robust=0)
    found = [(each.position, each.attack) for each in selected]
    assert found == [(0, "strong"), (2, "strong"), (4, "strong"), (3, "weak")]


def test_the_first_attack_is_the_one_that_was_run_first() -> None:
    tensors = decided(torch.zeros(8, 1, 8, 8, dtype=torch.uint8))
    by_name = gallery.select_images(tensors, ("strong", "weak", "without-images"), misclassified=9, robust=0)
    assert {each.position: each.attack for each in by_name}[3] == "strong"  # both attacks succeed on the third image


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_hold_the_pixels(channels: int) -> None:
    image_CHW = torch.arange(channels * 4).reshape(channels, 2, 2) / 255
    uri = gallery.to_uri(image_CHW)
    assert uri.startswith("data:image/png;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    found = torch.tensor(list(picture.tobytes())).reshape(2, 2, channels).permute(2, 0, 1)
    assert torch.equal(found, torch.arange(channels * 4).reshape(channels, 2, 2))


@pytest.fixture
def built(project: Path) -> Path:
    """The small project with adversarial images of its mixture."""
    images_NCHW = dataset.load(paths.DATASET)["test"].images[:8]
    header = classifiers.load(paths.MIXTURE).header
    artifacts.save(
        paths.ADVERSARIAL,
        gallery.KIND,
        decided(images_NCHW),
        about={"epsilon": 0.05, "norm": "linf"},
        params={},
        inputs={"mixture": header.sha256},
        seed=0,
        metrics={},
        seconds=0.0,
    )
    return project


def sources(clean: int = 7, worst: int = 3) -> Sources:
    """The made-up snapshot with the accuracies of the eight images."""
    record, path = made_up(), "metrics/evaluate/mixture.json"
    known = {"clean": share(clean, 8), "worst": share(worst, 8), **{name: share(4, 8) for name in ORDER}}
    accuracy = json.loads(record.content[path])["accuracy"] | known
    spent = {"images": 8, "attacked": 7, "forward": 70, "backward": 70}
    attacks = {name: {"settings": {"kind": "pgd"}, **spent} for name in ORDER}
    return Sources(record.changed(path, accuracy=accuracy, attacks=attacks))


def only_sentence(section: Section) -> str:
    assert [block.kind for block in section.blocks] == ["paragraph"]
    return str(getattr(section.blocks[0], "text"))  # noqa: B009  (mypy knows only that it is a block)


@pytest.mark.usefixtures("built")
def test_examples_show_pictures_predictions_and_gate() -> None:
    section = gallery.section(sources(), CURRENT_FOLDER, 4)
    shown = section.blocks[1]
    assert isinstance(shown, Gallery)
    assert [each.misclassified for each in shown.examples] == [True, True, True, False]
    first = shown.examples[0]
    assert first.title == "Image 100: misclassified under strong"
    assert [picture.title for picture in first.pictures] == ["clean", "perturbation", "adversarial"]
    assert all(picture.pixelated for picture in first.pictures)
    assert dict(first.facts)["true class"] == "0"
    weights = [float(each.cells[1].text) for each in first.weights.rows]
    assert sum(weights) == pytest.approx(100, abs=0.2)
    page = render_html(build_content(sources().snapshot, lambda each: gallery.section(each, CURRENT_FOLDER, 4)))
    assert page.count('class="pixelated"') >= 12


@pytest.mark.usefixtures("built")
def test_images_of_another_run_are_not_shown() -> None:
    assert "belong to another run" in only_sentence(gallery.section(sources(worst=2), CURRENT_FOLDER, 6))


def test_missing_images_are_named(project: Path) -> None:
    sentence = only_sentence(gallery.section(sources(), project, 6))
    assert "artifacts/evaluate/adversarial.safetensors missing" in sentence
    paths.MIXTURE.unlink()
    assert "artifacts/train/mixture.safetensors" in only_sentence(gallery.section(sources(), project, 6))


@pytest.mark.usefixtures("built")
def test_altered_images_are_refused() -> None:
    raw = bytearray(paths.ADVERSARIAL.read_bytes())
    raw[-1] ^= 1
    paths.ADVERSARIAL.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="checksum"):
        gallery.section(sources(), CURRENT_FOLDER, 6)

"""Images in: every source, what it refuses, and how the splits are drawn. No test needs a network."""

import contextlib
import gzip
import hashlib
import io
import socket
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from advmoe.core import artifacts, paths
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.data.batches import Augmentation, augment, batch_indices, batches, batches_per_epoch
from advmoe.data.dataset import SPLITS, DatasetInfo, SplitName, Splits
from advmoe.data.images import LabelledImages, SourceImages, check_source, numbered_class_names
from advmoe.data.sources import downloads
from advmoe.data.sources.digits import Digits
from advmoe.data.sources.downloads import CifarArchive, Download
from advmoe.data.sources.folder import Folder, read_image
from advmoe.data.sources.npz import Npz

SHARED = ROOT.parent / "shared" / "data"
PLANNED = Splits(pool=270, validation=180, test=360)

Pixels = NDArray[np.uint8]
Drawn = Mapping[SplitName, tuple[LabelledImages, NDArray[np.int64]]]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(count: int, classes: int = 4) -> NDArray[np.int64]:
    return np.arange(count, dtype=np.int64) % classes


def refusal(action: Callable[[], object]) -> str:
    """The sentence of the UserError that `action` raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    return str(caught.value)


# ---- digits and their splits -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> SourceImages:
    return Digits(kind="digits").read()


def positions(drawn: Drawn) -> dict[str, list[int]]:
    return {name: rows.tolist() for name, (_, rows) in drawn.items()}


def test_digits_are_the_1797_of_scikit_learn(digits: SourceImages) -> None:
    from sklearn.datasets import load_digits

    assert check_source(digits, "digits") is digits
    images = digits.train.images
    assert (images.shape, str(images.dtype), digits.test) == ((1797, 1, 8, 8), "uint8", None)
    assert (images.min(), images.max(), digits.class_names) == (0, 255, tuple("0123456789"))
    original = load_digits()
    assert np.abs(images[:, 0] / 255 - original.images / 16).max() <= 0.5 / 255  # only rounded to pixel levels
    assert (digits.train.labels == original.target).all()


def test_digits_are_split_as_planned(digits: SourceImages) -> None:
    drawn = dataset.draw_splits(digits, PLANNED, 0)
    sizes = {name: len(rows) for name, (_, rows) in drawn.items()}
    assert sizes == {"train": 987, "pool": 270, "validation": 180, "test": 360}
    everything = np.concatenate([rows for _, rows in drawn.values()])
    assert sorted(everything.tolist()) == list(range(1797))  # disjoint, and none is lost
    for part, rows in drawn.values():
        assert (part.images == digits.train.images[rows]).all()
        assert (part.labels == digits.train.labels[rows]).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_split_has_the_classes_in_their_shares(digits: SourceImages, seed: int) -> None:
    whole = np.bincount(digits.train.labels) / 1797
    for part, rows in dataset.draw_splits(digits, PLANNED, seed).values():
        # a plain draw of 360 images would be off by 5 or so
        assert np.abs(np.bincount(part.labels, minlength=10) - whole * len(rows)).max() < 2


def test_the_splits_are_shuffled(digits: SourceImages) -> None:
    for part, rows in dataset.draw_splits(digits, PLANNED, 0).values():
        assert rows.tolist() != sorted(rows.tolist())
        assert len(np.unique(part.labels[:40])) > 5  # `limit` takes the first n: they must not be of one class


def test_the_seed_alone_decides_the_splits(digits: SourceImages) -> None:
    first = positions(dataset.draw_splits(digits, PLANNED, 0))
    np.random.seed(3)  # the point is that it has no influence
    assert positions(dataset.draw_splits(digits, PLANNED, 0)) == first
    assert positions(dataset.draw_splits(digits, PLANNED, 1)) != first


def test_an_empty_pool_is_allowed(digits: SourceImages) -> None:
    drawn = dataset.draw_splits(digits, Splits(pool=0, validation=1, test=1), 0)
    assert [len(drawn[name][1]) for name in SPLITS] == [1795, 0, 1, 1]


def test_splits_that_leave_nothing_to_train_on_are_refused(digits: SourceImages) -> None:
    message = refusal(lambda: dataset.draw_splits(digits, Splits(pool=0, validation=797, test=1000), 0))
    assert message == "prepare.splits: 1797 images requested, but there are 1797 and training needs some"


def test_a_source_without_test_split_needs_a_number(digits: SourceImages) -> None:
    message = refusal(lambda: dataset.draw_splits(digits, Splits(pool=0, validation=1, test=None), 0))
    assert message.startswith("prepare.splits.test: this source has no official test split")


def with_official_test(count: int = 40) -> SourceImages:
    return SourceImages(
        LabelledImages(noise(60, 1, 8, 8), labels(60)),
        LabelledImages(noise(count, 1, 8, 8, seed=1), labels(count)),
        numbered_class_names(4),
    )


def test_an_official_test_split_is_kept_whole() -> None:
    source = with_official_test()
    assert source.test is not None
    drawn = dataset.draw_splits(source, Splits(pool=8, validation=8, test=None), 0)
    part, rows = drawn["test"]
    assert sorted(rows.tolist()) == list(range(40))
    assert (part.images == source.test.images[rows]).all()
    assert [len(drawn[name][1]) for name in SPLITS] == [44, 8, 8, 40]


def test_a_part_of_an_official_test_split_is_stratified() -> None:
    part, rows = dataset.draw_splits(with_official_test(), Splits(pool=0, validation=8, test=12), 0)["test"]
    assert np.bincount(part.labels).tolist() == [3, 3, 3, 3]
    assert len(set(rows.tolist())) == 12


def test_more_than_the_official_test_split_is_refused() -> None:
    message = refusal(lambda: dataset.draw_splits(with_official_test(), Splits(pool=0, validation=8, test=41), 0))
    assert message == "prepare.splits.test: 41 images requested, the test split has 40"


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_numpy(channels: int) -> None:
    images = noise(50, channels, 8, 9)
    images[:, 0] //= 2  # so that the channels differ
    mean, std = dataset.channel_statistics(images)
    assert mean == pytest.approx((images / 255).mean(axis=(0, 2, 3)), abs=1e-6)
    assert std == pytest.approx((images / 255).std(axis=(0, 2, 3)), abs=1e-6)


def test_a_constant_channel_is_refused() -> None:
    images = noise(5, 3, 8, 8)
    images[:, 1] = 7
    assert "channel of the training images is constant" in refusal(lambda: dataset.channel_statistics(images))


def drawn_with_duplicates() -> dict[SplitName, tuple[LabelledImages, NDArray[np.int64]]]:
    """The first two of eight test images occur in training as well, the first one twice there."""
    train, test = noise(10, 1, 8, 8), noise(8, 1, 8, 8, seed=1)
    train[3], train[4], train[7] = test[0], test[0], test[1]
    return {
        "train": (LabelledImages(train, labels(10)), np.arange(10)),
        "test": (LabelledImages(test, labels(8)), np.arange(8)),
    }


def test_leaked_counts_test_images_that_training_has_seen() -> None:
    drawn = drawn_with_duplicates()
    assert dataset.count_train_test_duplicates(drawn) == 2
    drawn["test"][0].images[0, 0, 0, 0] ^= 1  # one level of one pixel makes another image
    assert dataset.count_train_test_duplicates(drawn) == 1


def test_leaked_counts_equal_test_images_each() -> None:
    drawn = drawn_with_duplicates()
    drawn["test"][0].images[5] = drawn["test"][0].images[0]
    assert dataset.count_train_test_duplicates(drawn) == 3


def test_a_data_set_comes_back(digits: SourceImages, tmp_path: Path) -> None:
    drawn = dataset.draw_splits(digits, PLANNED, 0)
    mean, std = dataset.channel_statistics(drawn["train"][0].images)
    facts = DatasetInfo(channels=1, height=8, width=8, class_names=digits.class_names, mean=mean, std=std)
    path = tmp_path / "dataset.safetensors"
    sha256 = dataset.save(path, drawn, facts, params={}, seed=0, metrics={}, seconds=0.0)
    loaded = dataset.load(path)
    assert (loaded.facts, loaded.sha256, loaded.facts.classes) == (facts, sha256, 10)
    for name in SPLITS:
        part, rows = drawn[name]
        assert (loaded[name].images.numpy() == part.images).all()
        assert loaded[name].labels.tolist() == part.labels.tolist()
        assert loaded[name].index.tolist() == rows.tolist()


def test_a_data_set_with_an_empty_pool_comes_back(digits: SourceImages, tmp_path: Path) -> None:
    drawn = dataset.draw_splits(digits, Splits(pool=0, validation=180, test=360), 0)
    facts = DatasetInfo(channels=1, height=8, width=8, class_names=digits.class_names, mean=(0.5,), std=(0.5,))
    dataset.save(tmp_path / "dataset.safetensors", drawn, facts, params={}, seed=0, metrics={}, seconds=0.0)
    assert len(dataset.load(tmp_path / "dataset.safetensors")["pool"]) == 0


def test_pixels_are_shares_of_the_range_and_first_takes_the_first(project: Path) -> None:
    del project
    test = dataset.load(paths.DATASET)["test"]
    pixels = test.pixels()
    assert (pixels.dtype, float(pixels.min()), float(pixels.max())) == (torch.float32, 0.0, 1.0)
    assert torch.equal((pixels * 255).round().to(torch.uint8), test.images)
    assert torch.equal(test.first(7).index, test.index[:7])
    assert (len(test.first(None)), len(test.first(9999))) == (360, 360)


def test_a_data_set_without_a_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dataset.safetensors"
    facts = DatasetInfo(channels=1, height=8, width=8, class_names=("a", "b"), mean=(0.5,), std=(0.5,))
    dataset.save(path, {"train": (LabelledImages(noise(2, 1, 8, 8), labels(2)), np.arange(2))}, facts,
                 params={}, seed=0, metrics={}, seconds=0.0)  # fmt: skip
    assert refusal(lambda: dataset.load(path)) == f"{path}: has no tensor 'pool.images'; build it again"


def test_another_artifact_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    artifacts.save(
        path, "thing", {"a": torch.zeros(1)}, about={}, params={}, inputs={}, seed=0, metrics={}, seconds=0.0
    )
    assert refusal(lambda: dataset.load(path)) == f"{path}: holds a thing, but a dataset is needed here"


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(987, 64), (65, 64), (64, 64), (3, 64), (129, 64)])
def test_an_epoch_sees_every_image_once_in_batches_of_nearly_equal_size(count: int, size: int) -> None:
    parts = batch_indices(count, size, torch.Generator().manual_seed(0))
    sizes = {len(part) for part in parts}
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert len(parts) == batches_per_epoch(count, size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1  # BatchNorm cannot learn from a last batch of one image


def test_batches_are_seeded_and_keep_images_with_their_labels() -> None:
    images, classes = torch.from_numpy(noise(20, 1, 8, 8)), torch.arange(20)
    settings = Augmentation(crop=0, flip=False)

    def epoch(seed: int) -> list[int]:
        found = list[int]()
        for batch, own in batches(images, classes, 6, settings, torch.Generator().manual_seed(seed)):
            assert torch.equal(batch, images[own].float() / 255)
            found += own.tolist()
        return found

    assert epoch(0) == epoch(0) != epoch(1)


def test_augmentation_switched_off_changes_nothing() -> None:
    images = torch.from_numpy(noise(5, 3, 8, 8))
    assert torch.equal(augment(images, Augmentation(crop=0, flip=False), torch.Generator()), images)


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.from_numpy(noise(200, 1, 8, 8))
    found = augment(images, Augmentation(crop=0, flip=True), torch.Generator().manual_seed(0))
    mirrored = (found == images.flip(3)).flatten(1).all(dim=1)
    assert ((found == images).flatten(1).all(dim=1) ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130


def test_a_crop_shifts_each_image_by_its_own_draw() -> None:
    images = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255  # the centre stays inside under any shift of up to 2
    found = augment(images, Augmentation(crop=2, flip=False), torch.Generator().manual_seed(0))
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    shifts = {(int(row) - 4, int(column) - 4) for _, _, row, column in (found == 255).nonzero()}
    assert int((found == 255).sum()) == 200
    assert shifts == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


# ---- npz -------------------------------------------------------------------------------------------------------------


def npz(train: Path, test: Path | None = None, **limits: int | None) -> Npz:
    return Npz(kind="npz", train=train, test=test, **({"per_class": None, "test_per_class": None} | limits))


@pytest.mark.parametrize(("shape", "expected"), [((20, 8, 9), (20, 1, 8, 9)), ((20, 8, 9, 3), (20, 3, 8, 9))])
def test_npz_comes_back(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    path, images = tmp_path / "a.npz", noise(*shape)
    np.savez_compressed(path, images=images, labels=labels(20).astype(np.uint8), class_names=np.array(list("wxyz")))
    source = check_source(npz(path).read(), "npz")
    assert source.train.images.shape == expected
    assert (np.moveaxis(source.train.images, 1, -1).reshape(shape) == images).all()
    assert source.train.labels.tolist() == labels(20).tolist()
    assert (str(source.train.labels.dtype), source.class_names, source.test) == ("int64", tuple("wxyz"), None)


def test_npz_without_names_numbers_its_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=noise(20, 8, 8), labels=labels(20))
    assert npz(tmp_path / "a.npz").read().class_names == ("0", "1", "2", "3")


def test_npz_with_a_test_file_has_an_official_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=noise(20, 8, 8), labels=labels(20, 2))
    np.savez(tmp_path / "test.npz", images=noise(9, 8, 8, seed=1), labels=labels(9, 3))
    source = npz(tmp_path / "train.npz", tmp_path / "test.npz").read()
    assert source.test is not None
    assert (len(source.test.labels), source.class_names) == (9, ("0", "1", "2"))


def test_npz_files_must_agree_on_their_class_names(tmp_path: Path) -> None:
    for name in ("train", "test"):
        np.savez(
            tmp_path / f"{name}.npz", images=noise(4, 8, 8), labels=labels(4, 2), class_names=np.array(["a", name])
        )
    message = refusal(lambda: npz(tmp_path / "train.npz", tmp_path / "test.npz").read())
    assert message.startswith(f"{tmp_path / 'test.npz'}: its class_names differ")


def test_per_class_takes_the_first_of_each_class_in_order(tmp_path: Path) -> None:
    own = np.array([2, 0, 0, 1, 2, 2, 0, 1, 1, 1], dtype=np.int64)
    np.savez(tmp_path / "a.npz", images=noise(10, 8, 8), labels=own)
    path = tmp_path / "a.npz"
    source = npz(path, path, per_class=2, test_per_class=1).read()
    everything = npz(path).read().train.images
    assert source.test is not None
    assert source.train.labels.tolist() == [2, 0, 0, 1, 2, 1]
    assert (source.train.images == everything[[0, 1, 2, 3, 4, 7]]).all()
    assert (source.test.images == everything[[0, 1, 3]]).all()


def write_npz(path: Path, **arrays: Any) -> Callable[[], object]:
    """Write a file of usable arrays with some changed (None: left out); returns what reads and checks it."""
    usable: dict[str, Any] = {"images": noise(20, 8, 8), "labels": labels(20)}
    np.savez(path, **{name: array for name, array in (usable | arrays).items() if array is not None})
    return lambda: check_source(npz(path).read(), str(path))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": None}, "has no array 'images'"),
        ({"labels": None}, "has no array 'labels'"),
        ({"images": noise(20, 8, 8) / 255}, "'images' must be uint8"),
        ({"images": noise(20, 8, 8).astype(np.int64)}, "'images' must be uint8"),
        ({"images": noise(20, 64)}, "'images' must be uint8 of shape"),
        ({"images": noise(0, 8, 8), "labels": labels(0)}, "contains no images"),
        ({"images": noise(20, 8, 8, 4)}, "images must be uint8 with 1 or 3 channels"),
        ({"images": noise(20, 7, 9)}, "images must be at least 8 pixels a side, got 1 x 7 x 9"),
        ({"labels": labels(20).astype(np.float64)}, "'labels' must be 20 integers, got float64"),
        ({"labels": labels(19)}, "'labels' must be 20 integers, got int64 (19,)"),
        ({"labels": labels(20)[:, None]}, "'labels' must be 20 integers"),
        ({"labels": labels(20) - 1}, "labels must lie in 0.."),
        ({"class_names": np.array(["a", "b"])}, "labels must lie in 0..1, found 0..3"),
        ({"labels": labels(20, 1)}, "a classifier needs at least two classes, found 1"),
        ({"labels": np.array(["a", "b"] * 10)}, "'labels' must be 20 integers"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], expected: str) -> None:
    path = tmp_path / "a.npz"
    assert refusal(write_npz(path, **arrays)).startswith(f"{path}: {expected}")


class Trap:
    """Unpickling this would run code."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


@pytest.mark.parametrize("name", ["images", "labels", "class_names"])
def test_a_pickled_npz_is_refused_and_runs_no_code(tmp_path: Path, name: str) -> None:
    read = write_npz(tmp_path / "a.npz", **{name: np.array([Trap()], dtype=object)})
    assert "cannot be read as .npz without pickle" in refusal(read)
    assert not Trap.sprung


@pytest.mark.parametrize("keep", [0, 10, 200, -200, -1])
def test_a_truncated_npz_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.npz"
    read = write_npz(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(read).startswith(f"{path}: cannot be read as .npz without pickle")


def test_a_missing_npz_and_a_plain_npy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    assert refusal(lambda: npz(path).read()) == f"{path}: no such file"
    np.save(path, noise(20, 8, 8))
    assert refusal(lambda: npz(path).read()).startswith(f"{path}: cannot be read as .npz")


def test_a_damaged_compressed_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=noise(20, 8, 8), labels=labels(20))
    content = path.read_bytes()
    for position in range(20, len(content) - 1, 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        with contextlib.suppress(UserError):  # a flip in what nobody reads may pass; any other exception may not
            npz(path).read()


def test_class_names_that_are_no_list_are_refused(tmp_path: Path) -> None:
    refusal(write_npz(tmp_path / "a.npz", class_names=np.array("abcd")))


def test_the_check_wants_train_and_test_of_one_size() -> None:
    source = SourceImages(
        LabelledImages(noise(4, 1, 8, 8), labels(4)),
        LabelledImages(noise(4, 1, 9, 8), labels(4)),
        numbered_class_names(4),
    )
    message = refusal(lambda: check_source(source, "here"))
    assert message == "here: training images are 1 x 8 x 8, test images 1 x 9 x 8; sizes must agree"


def test_real_images_as_npz() -> None:
    path = SHARED / "fashion_mnist_test_first200.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent: real images are not part of the project")
    source = check_source(npz(path, per_class=20).read(), "npz")
    assert source.train.images.shape == (200, 1, 28, 28)
    assert np.bincount(source.train.labels).tolist() == [20] * 10
    assert source.class_names == downloads.FASHION  # two sources of the same set must call the classes alike
    mean, _ = dataset.channel_statistics(npz(path).read().train.images)
    assert mean == pytest.approx((0.286,), abs=0.01)  # the published mean of Fashion-MNIST


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder(path: Path, size: int | None = None, channels: Any = 1) -> Folder:
    return Folder(kind="folder", path=path, size=size, channels=channels)


def write_image(path: Path, pixels: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_of_png_comes_back(tmp_path: Path) -> None:
    grey = noise(6, 9, 8)
    for number, pixels in enumerate(grey):
        write_image(tmp_path / "cb"[number % 2] / f"{number}.png", pixels)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    source = check_source(folder(tmp_path).read(), "folder")
    assert (source.class_names, source.test) == (("b", "c"), None)
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.train.images[:, 0] == grey[[1, 3, 5, 0, 2, 4]]).all()


def test_a_folder_of_colour_jpeg_is_read(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    write_image(tmp_path / "red" / "1.jpg", red)
    write_image(tmp_path / "grey" / "1.JPEG", np.full((8, 8), 90, dtype=np.uint8))
    source = folder(tmp_path, channels=3).read()
    assert source.train.images.shape == (2, 3, 8, 8)
    means = source.train.images.mean(axis=(2, 3))  # class grey comes first
    assert means == pytest.approx(np.array([[90, 90, 90], [200, 0, 0]]), abs=3)  # JPEG rounds


def test_colour_becomes_grey_when_one_channel_is_asked_for(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8))
    assert np.unique(read_image(path, 1, None)).tolist() == [76]  # ITU-R 601: 0.299 of red


def test_train_and_test_folders_are_an_official_split(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "train", "test")):
        for name in ("a", "b"):
            write_image(tmp_path / part / name / f"{number}.png", noise(8, 8, seed=number))
    source = folder(tmp_path).read()
    assert source.test is not None
    assert (len(source.train.labels), source.test.labels.tolist(), source.class_names) == (4, [0, 1], ("a", "b"))


def test_a_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "test/a", "test/z"):
        write_image(tmp_path / place / "1.png", noise(8, 8))
    message = refusal(lambda: folder(tmp_path).read())
    assert message == f"{tmp_path / 'test' / 'z'}: a class that has no training images"


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png", noise(8, 8))
    odd = write_image(tmp_path / "b" / "1.png", noise(9, 12))
    message = refusal(lambda: folder(tmp_path).read())
    assert message.startswith(f"{odd}: 12x9 pixels, but the first image has 8x8; set prepare.source.size")
    assert folder(tmp_path, size=10).read().train.images.shape == (2, 1, 10, 10)


def test_resizing_keeps_what_the_image_shows(tmp_path: Path) -> None:
    halves = np.zeros((32, 32), dtype=np.uint8)
    halves[:, 16:] = 255
    path = write_image(tmp_path / "a.png", halves)
    found = read_image(path, 1, (8, 8))[..., 0]
    assert (found[:, :3] < 20).all()
    assert (found[:, 5:] > 235).all()


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    assert (read_image(write_image(tmp_path / "a.png", pixels), 1, (8, 8))[..., 0] == pixels).all()


def test_a_missing_folder_an_empty_one_and_one_class_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "images"
    assert refusal(lambda: folder(root).read()) == f"{root}: no such folder"
    root.mkdir()
    assert refusal(lambda: folder(root).read()).startswith(f"{root}: needs one subfolder per class")
    write_image(root / "only" / "1.png", noise(8, 8))
    assert refusal(lambda: folder(root).read()).endswith("at least two classes, found 1")
    (root / "other").mkdir()
    assert "at least two classes, found 1" in refusal(lambda: check_source(folder(root).read(), "here"))


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert refusal(lambda: folder(tmp_path).read()) == f"{tmp_path}: no PNG or JPEG images in its class folders"


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_broken_image_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / name / f"1{suffix}", noise(16, 16))
    broken = tmp_path / "b" / f"1{suffix}"
    content = broken.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2], content[:8] + b"\0" * 40 + content[48:]):
        broken.write_bytes(damaged)
        assert refusal(lambda: folder(tmp_path).read()).startswith(f"{broken}: cannot be read as an image")


def test_a_tiny_image_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", noise(7, 30))
    assert refusal(lambda: read_image(path, 1, None)) == f"{path}: images must be at least 8 pixels a side, got 30x7"


def test_a_16_bit_image_is_scaled_or_refused(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png")
    try:
        found = read_image(tmp_path / "a.png", 1, None)[..., 0]
    except UserError:
        return
    assert np.abs(found.astype(int) - pixels.astype(int)).max() <= 1


def test_a_folder_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="channels"):
        folder(Path("x"), channels=2)


# ---- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's cache in a temporary folder; returns its folder of data sets."""
    monkeypatch.setenv("ADVMOE_CACHE_DIR", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    return tmp_path / "datasets"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL on this machine that refuses every connection."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    return f"http://127.0.0.1:{port}/"


def download(kind: Any, per_class: int | None = None, test_per_class: int | None = None) -> SourceImages:
    return Download(kind=kind, per_class=per_class, test_per_class=test_per_class).read()


def cifar_records(images: Pixels, own: NDArray[np.int64], label_bytes: int) -> bytes:
    """The official layout: label bytes, of which the last counts, then red, green and blue planes."""
    first = [b"\x63"] * (label_bytes - 1)
    rows = zip(images, own, strict=True)
    return b"".join(b"".join(first) + bytes([int(label)]) + image.tobytes() for image, label in rows)


def write_cifar(root: Path, edition: CifarArchive, files: Mapping[str, bytes]) -> CifarArchive:
    """A small archive under the edition's name; returns the edition with its checksum."""
    with tarfile.open(root / edition.archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    md5 = hashlib.md5((root / edition.archive).read_bytes()).hexdigest()  # noqa: S324  (the official checksums are MD5)
    return CifarArchive(edition.archive, md5, edition.train, edition.test, edition.names, edition.label_bytes)


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_records_are_taken_apart(label_bytes: int) -> None:
    images, own = noise(5, 3, 32, 32), labels(5)
    found = downloads.parse_cifar(cifar_records(images, own, label_bytes), label_bytes)
    assert (found.images == images).all()
    assert (found.labels.tolist(), str(found.labels.dtype)) == (own.tolist(), "int64")


@pytest.mark.parametrize("length", [0, 1, 3072, 3074, 2 * 3073 - 1])
def test_a_cifar_file_of_the_wrong_length_is_refused(length: int) -> None:
    message = refusal(lambda: downloads.parse_cifar(b"\0" * length, 1))
    assert message == f"prepare.source: a CIFAR file of {length} bytes is not a multiple of the record size of 3073"


@pytest.mark.parametrize(("kind", "constant"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_is_read_from_its_binary_archive(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, constant: str
) -> None:
    edition: CifarArchive = getattr(downloads, constant)
    contents = {edition.names: b"cat\ndog\nowl\n\n"}
    for number, name in enumerate([*edition.train, *edition.test]):
        contents[name] = cifar_records(noise(6, 3, 32, 32, seed=number), labels(6, 3), edition.label_bytes)
    monkeypatch.setattr(downloads, constant, write_cifar(cache, edition, contents))
    source = check_source(download(kind, test_per_class=1), kind)
    assert source.test is not None
    assert source.class_names == ("cat", "dog", "owl")
    expected = np.concatenate([noise(6, 3, 32, 32, seed=number) for number in range(len(edition.train))])
    assert (source.train.images == expected).all()
    assert (source.test.images == noise(6, 3, 32, 32, seed=len(edition.train))[:3]).all()
    assert [entry.name for entry in cache.iterdir() if entry.suffix != ".lock"] == [
        edition.archive
    ]  # read, never extracted


def test_a_cifar_archive_with_a_wrong_checksum_is_not_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    monkeypatch.setattr(downloads, "CIFAR_URL", nowhere)
    (cache / downloads.CIFAR10.archive).write_bytes(b"a download that broke off")
    assert "could not be downloaded" in refusal(lambda: download("cifar10"))


def write_idx(root: Path, stem: str, images: Pixels, own: NDArray[np.int64]) -> None:
    """The MNIST format: a magic number, the dimensions, the bytes."""
    root.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images", images), ("labels", own.astype(np.uint8))):
        head = struct.pack(f">i{array.ndim}i", 0x800 + array.ndim, *array.shape)
        name = f"{stem}-{kind}-idx{array.ndim}-ubyte"
        (root / name).write_bytes(head + array.tobytes())
        (root / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))


@pytest.mark.parametrize(
    ("kind", "name", "class_names"),
    [("mnist", "MNIST", numbered_class_names(10)), ("fashion-mnist", "FashionMNIST", downloads.FASHION)],
)
def test_mnist_is_read_from_the_cache(cache: Path, kind: str, name: str, class_names: tuple[str, ...]) -> None:
    for seed, stem in enumerate(("train", "t10k")):
        write_idx(cache / name / "raw", stem, noise(12, 28, 28, seed=seed), labels(12))
    source = check_source(download(kind, per_class=2), kind)
    assert source.test is not None
    assert (source.train.images == noise(12, 1, 28, 28)[:8]).all()
    assert (source.test.images == noise(12, 1, 28, 28, seed=1)).all()
    assert (source.test.labels.tolist(), source.class_names) == (labels(12).tolist(), class_names)


def test_svhn_is_read_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    editions = {}
    for seed, split in enumerate(("train", "test")):
        own = np.array([[10], [1], [9]])  # the files call the digit 0 class 10
        pixels = np.moveaxis(noise(3, 3, 32, 32, seed=seed), (0, 1), (3, 2))  # H, W, C, N
        file = cache / f"{split}_32x32.mat"
        savemat(file, {"X": pixels, "y": own})
        editions[split] = ["http://127.0.0.1/", file.name, hashlib.md5(file.read_bytes()).hexdigest()]  # noqa: S324
    monkeypatch.setattr(SVHN, "split_list", editions)
    source = check_source(download("svhn"), "svhn")
    assert source.test is not None
    assert source.train.labels.tolist() == [0, 1, 9]
    assert (source.test.images == noise(3, 3, 32, 32, seed=1)).all()


def break_mnist(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [url])


def break_svhn(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from torchvision.datasets import SVHN

    lists = {split: [url + file, file, md5] for split, (_, file, md5) in SVHN.split_list.items()}
    monkeypatch.setattr(SVHN, "split_list", lists)


def break_cifar(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(downloads, "CIFAR_URL", url)


@pytest.mark.parametrize(
    ("kind", "cut_off"),
    [
        ("cifar10", break_cifar),
        ("cifar100", break_cifar),
        ("svhn", break_svhn),
        pytest.param(
            "mnist",
            break_mnist,
        ),
    ],
)
def test_without_a_network_there_is_one_clear_sentence(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    nowhere: str,
    kind: str,
    cut_off: Callable[[pytest.MonkeyPatch, str], None],
) -> None:
    cut_off(monkeypatch, nowhere)
    message = refusal(lambda: download(kind))
    assert message.startswith(f"prepare.source: {kind} is not complete in {cache} and could not be downloaded (")
    assert "Connection refused" in message
    assert message.endswith("; connect to the internet once, or copy the official files there")

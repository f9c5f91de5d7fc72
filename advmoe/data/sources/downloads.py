"""Published data sets by name, downloaded through torchvision with progress and checksums into the machine's cache.

CIFAR is read from its official binary version: torchvision's own class reads a pickle, and loading data must not run
code. MNIST and Fashion-MNIST are idx files, SVHN a MATLAB matrix; torchvision reads those safely.

torchvision is imported where it is used, because the import takes seconds.
"""

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Settings
from advmoe.data.images import LabelledImages, SourceImages, as_nchw, numbered_class_names
from advmoe.runtime.machine import machine

CIFAR_PIXELS = 3 * 32 * 32
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Download(Settings):
    """`per_class` and `test_per_class` keep the first n images of each class in official order; null keeps all."""

    kind: Literal["cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"]
    per_class: PositiveInt | None
    test_per_class: PositiveInt | None

    def read(self) -> SourceImages:
        """Returns the data set. Raises UserError if it is not in the cache and cannot be downloaded."""
        root = machine().cache_dir / "datasets"
        try:
            with _download_lock(root, self.kind):
                source = READERS[self.kind](root)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(
                f"prepare.source: {self.kind} is not complete in {root} and could not be downloaded "
                f"({' '.join(str(error).split())}); "
                "connect to the internet once, or copy the official files there"
            ) from error
        test = source.test.first_per_class(self.test_per_class) if source.test else None
        return SourceImages(source.train.first_per_class(self.per_class), test, source.class_names)


@contextmanager
def _download_lock(root: Path, kind: str) -> Iterator[None]:
    """Locks a data set during its download, so that two processes do not write the same file; no lock if read-only.

    Raises OSError if the cache folder does not exist and cannot be created.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        yield
        return
    with FileLock(root / f".{kind}.lock"):
        yield


@dataclass(frozen=True)
class CifarArchive:
    """Archive, members and record layout of the binary version of a CIFAR set (cs.toronto.edu/~kriz/cifar)."""

    archive: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int  # CIFAR-100 has a coarse label before the fine one; the last label byte is used


CIFAR10 = CifarArchive(
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    train=tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
    test=("cifar-10-batches-bin/test_batch.bin",),
    names="cifar-10-batches-bin/batches.meta.txt",
    label_bytes=1,
)
CIFAR100 = CifarArchive(
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    train=("cifar-100-binary/train.bin",),
    test=("cifar-100-binary/test.bin",),
    names="cifar-100-binary/fine_label_names.txt",
    label_bytes=2,
)
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def parse_cifar(content: bytes, label_bytes: int) -> LabelledImages:
    """Parses records of `label_bytes` labels and 3 x 32 x 32 pixels. Raises UserError if the length does not match."""
    record = label_bytes + CIFAR_PIXELS
    if not content or len(content) % record:
        raise UserError(
            f"prepare.source: a CIFAR file of {len(content)} bytes is not a multiple of the record size of {record}"
        )
    table = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    images = table[:, label_bytes:].reshape(-1, 3, 32, 32)
    return LabelledImages(np.ascontiguousarray(images), table[:, label_bytes - 1].astype(np.int64))


def _read_cifar(archive_info: CifarArchive, root: Path) -> SourceImages:
    from torchvision.datasets.utils import check_integrity, download_url

    archive = root / archive_info.archive
    if not check_integrity(archive, archive_info.md5):
        download_url(CIFAR_URL + archive_info.archive, root, archive_info.archive, archive_info.md5)
    with tarfile.open(archive) as tar:  # members are read, never extracted: no path of the archive is written

        def member(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None, name
            return file.read()

        def split(members: Sequence[str]) -> LabelledImages:
            return parse_cifar(b"".join(member(name) for name in members), archive_info.label_bytes)

        names = tuple(member(archive_info.names).decode().split())
        return SourceImages(split(archive_info.train), split(archive_info.test), names)


def _labelled(images: Any, labels: Any) -> LabelledImages:
    pixels: NDArray[np.uint8] = np.asarray(images, dtype=np.uint8)
    return LabelledImages(pixels, np.asarray(labels, dtype=np.int64))


def _read_svhn(root: Path) -> SourceImages:
    from torchvision.datasets import SVHN

    train, test = (SVHN(root, split=split, download=True) for split in ("train", "test"))
    return SourceImages(
        _labelled(train.data, train.labels), _labelled(test.data, test.labels), numbered_class_names(10)
    )


def _read_mnist(kind: Literal["MNIST", "FashionMNIST"], names: tuple[str, ...], root: Path) -> SourceImages:
    from torchvision import datasets

    train, test = (getattr(datasets, kind)(root, train=is_train, download=True) for is_train in (True, False))
    return SourceImages(
        _labelled(as_nchw(train.data.numpy()), train.targets),
        _labelled(as_nchw(test.data.numpy()), test.targets),
        names,
    )


READERS: dict[str, Callable[[Path], SourceImages]] = {
    "cifar10": lambda root: _read_cifar(CIFAR10, root),
    "cifar100": lambda root: _read_cifar(CIFAR100, root),
    "svhn": _read_svhn,
    "mnist": lambda root: _read_mnist("MNIST", numbered_class_names(10), root),
    "fashion-mnist": lambda root: _read_mnist("FashionMNIST", FASHION, root),
}

"""Your own images as .npz: `images` (uint8, N x H x W or N x H x W x 3), `labels` (integers), optional `class_names`.

Read without pickle: a data file cannot run code.
"""

import lzma
import os
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from advmoe.core.errors import STUMBLES, UserError, first_line
from advmoe.core.settings import PositiveInt, Settings
from advmoe.data.images import Labelled, SourceImages, as_nchw, numbered


class Npz(Settings):
    """One file for training and, where there is an official split, one for testing."""

    kind: Literal["npz"]
    train: Path
    test: Path | None
    per_class: PositiveInt | None
    test_per_class: PositiveInt | None

    def read(self) -> SourceImages:
        """Raises UserError when a file is missing, broken, pickled or has the wrong arrays."""
        train, names = read_npz(self.train)
        test, test_names = read_npz(self.test) if self.test else (None, None)
        if test_names and names and test_names != names:
            raise UserError(f"{self.test}: its class_names differ from those of {self.train}")
        highest = max(part.labels.max() for part in (train, test) if part is not None and len(part.labels))
        return SourceImages(
            train.first_per_class(self.per_class),
            test.first_per_class(self.test_per_class) if test else None,
            names or numbered(int(highest) + 1),
        )


def read_npz(path: Path) -> tuple[Labelled, tuple[str, ...] | None]:
    """Images, labels and class names (None if absent) of one file. Raises UserError if it is unusable."""
    arrays = _arrays(path)
    for name in ("images", "labels"):
        if name not in arrays:
            raise UserError(f"{path}: has no array '{name}'")
    images, labels = arrays["images"], arrays["labels"]
    if images.shape[:1] == (0,):
        raise UserError(f"{path}: holds no images")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"{path}: 'images' must be uint8 of shape N x H x W or N x H x W x 3, got {images.dtype} {images.shape}"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: 'labels' must be {len(images)} integers, got {labels.dtype} {labels.shape}")
    return Labelled(as_nchw(images), labels.astype(np.int64)), _class_names(path, arrays)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            _refuse_bomb(path, file.zip)
            return {name: file[name] for name in ("images", "labels", "class_names") if name in file}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, TokenError, *STUMBLES) as error:
        # NumPy's own sentence recommends to unpickle the file
        reason = "" if "pickle" in str(error) else f" ({first_line(error)})"
        raise UserError(f"{path}: cannot be read as .npz without pickle{reason}") from error


def _refuse_bomb(path: Path, archive: zipfile.ZipFile) -> None:
    """A small archive can unpack to any size; what memory does not hold would take the machine down."""
    unpacked = sum(member.file_size for member in archive.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if unpacked > memory:
        raise UserError(f"{path}: unpacks to {unpacked / 2**30:.0f} GiB, more than the memory of this machine")


def _class_names(path: Path, arrays: dict[str, Any]) -> tuple[str, ...] | None:
    if "class_names" not in arrays:
        return None
    if arrays["class_names"].ndim != 1:
        raise UserError(f"{path}: 'class_names' must be a list of names, got shape {arrays['class_names'].shape}")
    return tuple(map(str, arrays["class_names"]))

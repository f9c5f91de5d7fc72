"""Images from .npz files: `images` (uint8, N x H x W or N x H x W x 3), `labels` (integers), optional `class_names`.

Files are read without pickle, so that a data file cannot execute code.
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

from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError, error_summary
from advmoe.core.settings import PositiveInt, Settings
from advmoe.data.images import LabelledImages, SourceImages, as_nchw, numbered_class_names


class Npz(Settings):
    """`train`, `test`: .npz files; `per_class`, `test_per_class`: first n images of each class, null for all."""

    kind: Literal["npz"]
    train: Path
    test: Path | None
    per_class: PositiveInt | None
    test_per_class: PositiveInt | None

    def read(self) -> SourceImages:
        """Returns the images. Raises UserError if a file is missing, broken, pickled or has the wrong arrays."""
        train, names = read_npz(self.train)
        test, test_names = read_npz(self.test) if self.test else (None, None)
        if test_names and names and test_names != names:
            raise UserError(f"{self.test}: its class_names differ from those of {self.train}")
        highest = max(part.labels.max() for part in (train, test) if part is not None and len(part.labels))
        return SourceImages(
            train.first_per_class(self.per_class),
            test.first_per_class(self.test_per_class) if test else None,
            names or numbered_class_names(int(highest) + 1),
        )


def read_npz(path: Path) -> tuple[LabelledImages, tuple[str, ...] | None]:
    """Returns images and labels, and class names (None if absent), of a file. Raises UserError if it is invalid."""
    arrays = _arrays(path)
    for name in ("images", "labels"):
        if name not in arrays:
            raise UserError(f"{path}: has no array '{name}'")
    images, labels = arrays["images"], arrays["labels"]
    if images.shape[:1] == (0,):
        raise UserError(f"{path}: contains no images")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"{path}: 'images' must be uint8 of shape N x H x W or N x H x W x 3, got {images.dtype} {images.shape}"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: 'labels' must be {len(images)} integers, got {labels.dtype} {labels.shape}")
    return LabelledImages(as_nchw(images), labels.astype(np.int64)), _class_names(path, arrays)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            _check_unpacked_size(path, file.zip)
            return {name: file[name] for name in ("images", "labels", "class_names") if name in file}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, TokenError, *MALFORMED_INPUT_ERRORS) as error:
        # NumPy's own message recommends allow_pickle=True
        reason = "" if "pickle" in str(error) else f" ({error_summary(error)})"
        raise UserError(f"{path}: cannot be read as .npz without pickle{reason}") from error


def _check_unpacked_size(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises UserError if the unpacked arrays exceed the memory of this machine (a decompression bomb)."""
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

"""Images from a folder with one subfolder per class that contains PNG or JPEG files.

Subfolders `train` and `test`, each with the class folders, define the test split; without them `prepare` draws one.
"""

import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError, error_summary
from advmoe.core.settings import PositiveInt, Settings
from advmoe.data.images import SMALLEST_SIDE, LabelledImages, SourceImages, stack_images

SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
# regardless of the file name: Pillow reads many more formats, and starts Ghostscript for one of them
FORMATS = ("PNG", "JPEG")
MODES = {1: "L", 3: "RGB"}


class Folder(Settings):
    """`size`: side in pixels to which every image is resized; null keeps the sizes, which must then be equal."""

    kind: Literal["folder"]
    path: Path
    size: PositiveInt | None
    channels: Literal[1, 3]

    def read(self) -> SourceImages:
        """Returns the images. Raises UserError for no images, fewer than two classes, mixed sizes or a broken image."""
        if not is_directory(self.path):
            raise UserError(f"{self.path}: no such folder")
        official = (self.path / "train").is_dir() and (self.path / "test").is_dir()
        train_root = self.path / "train" if official else self.path
        names = _subfolders(train_root)
        if len(names) < 2:
            raise UserError(f"{train_root}: needs one subfolder per class and at least two classes, found {len(names)}")
        test = self._read_split(self.path / "test", names) if official else None
        return SourceImages(self._read_split(train_root, names), test, names)

    def _read_split(self, root: Path, names: tuple[str, ...]) -> LabelledImages:
        unknown = sorted(set(_subfolders(root)) - set(names))
        if unknown:
            raise UserError(f"{root / unknown[0]}: a class that has no training images")
        images: list[NDArray[np.uint8]] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            for file in sorted((root / name).glob("*")):
                if file.suffix.lower() in SUFFIXES:
                    images.append(read_image(file, self.channels, (self.size, self.size) if self.size else None))
                    labels.append(label)
                    if images[-1].shape != images[0].shape:
                        raise UserError(
                            f"{file}: {_size(images[-1])} pixels, but the first image has {_size(images[0])}; "
                            "set prepare.source.size to resize them all"
                        )
        if not images:
            raise UserError(f"{root}: no PNG or JPEG images in its class folders")
        return LabelledImages(stack_images(images), np.array(labels, dtype=np.int64))


def is_directory(path: Path) -> bool:
    """Returns whether `path` is a directory; False, not OSError or ValueError, for an invalid path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # the name is too long or contains a NUL
        return False


def read_image(path: Path, channels: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Returns an image file as (H, W, C) uint8, resized to `size` (width, height) unless None.

    Raises UserError if it is missing, broken or too small.
    """
    try:
        with _open(path) as image:
            pixels = _eight_bit(image).convert(MODES[channels])
            if size is not None and pixels.size != size:
                pixels = pixels.resize(size, Image.Resampling.LANCZOS)
            array = np.asarray(pixels, dtype=np.uint8)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (Image.DecompressionBombError, Warning, *MALFORMED_INPUT_ERRORS) as error:
        raise UserError(f"{path}: cannot be read as an image ({error_summary(error)})") from error
    if min(array.shape[:2]) < SMALLEST_SIDE:
        raise UserError(f"{path}: images must be at least {SMALLEST_SIDE} pixels a side, got {_size(array)}")
    return array[..., None] if array.ndim == 2 else array


def _open(path: Path) -> Image.Image:
    """Opens an image; turns Pillow's warning about very large images into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey images to 8 bit; Pillow's own conversion would clip values above 255."""
    if image.mode not in {"I", "I;16", "I;16B", "I;16L"}:
        return image
    return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))


def _subfolders(root: Path) -> tuple[str, ...]:
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"{root}: cannot be read (permission denied)")
    return tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"

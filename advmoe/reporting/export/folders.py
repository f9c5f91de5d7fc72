"""Atomic replacement of a folder."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advmoe.core.errors import UserError


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which replaces `folder` when the block ends without an error.

    After an error the old folder is unchanged. A process killed between the two renames leaves both folders complete,
    under hidden names next to it. Raises UserError when the folder cannot be written.
    """
    target = folder.resolve()  # a link to a folder stays a link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new_folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
        try:
            yield new_folder
            new_folder.chmod(0o755)  # mkdtemp creates private folders
            _replace(new_folder, target)
        finally:
            shutil.rmtree(new_folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error.strerror or error}); nothing was changed") from error


def _replace(new_folder: Path, target: Path) -> None:
    if not target.exists():
        new_folder.rename(target)
        return
    backup = new_folder.with_suffix(".old")
    target.rename(backup)
    try:
        new_folder.rename(target)
    except BaseException:
        backup.rename(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)

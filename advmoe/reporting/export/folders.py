"""A folder of files that belong together: the new one whole, or the old one whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advmoe.core.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an error, it takes the place of `folder`.

    What was there is removed, and stays as it was if anything goes wrong. A process killed between the two renamings
    leaves both folders whole, under hidden names beside it. Raises UserError when the disk refuses.
    """
    target = folder.resolve()  # a link to a folder stays a link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
        try:
            yield fresh
            fresh.chmod(0o755)  # mkdtemp makes private folders; exports are for sharing
            _take_the_place(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error.strerror or error}); nothing was changed") from error


def _take_the_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    aside = fresh.with_suffix(".old")
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)

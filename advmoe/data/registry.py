"""All sources of images. A new one is a file beside this and a name in the union."""

from typing import Annotated

from pydantic import Field

from advmoe.core.settings import Settings
from advmoe.data.dataset import Splits
from advmoe.data.sources.digits import Digits
from advmoe.data.sources.downloads import Download
from advmoe.data.sources.folder import Folder
from advmoe.data.sources.npz import Npz

Source = Annotated[Digits | Npz | Folder | Download, Field(discriminator="kind")]


class Prepare(Settings):
    """Where the images come from and how they are split."""

    source: Source
    splits: Splits

"""The union of all sources of images, and the settings of `prepare`.

To add a source: write a module in `advmoe/data/sources` and add its settings class to `Source`.
"""

from typing import Annotated

from pydantic import Field

from advmoe.core.settings import Settings
from advmoe.data.dataset import Splits
from advmoe.data.sources.digits import Digits
from advmoe.data.sources.downloads import Download
from advmoe.data.sources.folder import Folder
from advmoe.data.sources.npz import Npz

Source = Annotated[Digits | Npz | Folder | Download, Field(discriminator="kind")]


class PrepareSettings(Settings):
    """The source of the images and the sizes of the splits."""

    source: Source
    splits: Splits

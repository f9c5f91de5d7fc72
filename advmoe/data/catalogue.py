"""All sources of images. A new one is a file beside this and a name in the union."""

from typing import Annotated

from pydantic import Field

from advmoe.data.dataset import Splits
from advmoe.data.digits import Digits
from advmoe.data.downloads import Download
from advmoe.data.folder import Folder
from advmoe.data.npz import Npz
from advmoe.params import Settings

Source = Annotated[Digits | Npz | Folder | Download, Field(discriminator="kind")]


class Prepare(Settings):
    """Where the images come from and how they are split."""

    source: Source
    splits: Splits

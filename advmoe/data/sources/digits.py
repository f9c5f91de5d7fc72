"""scikit-learn's digits: 1797 handwritten digits of 8x8 pixels, embedded in the package, no download."""

from typing import Literal

import numpy as np

from advmoe.core.settings import Settings
from advmoe.data.images import Labelled, SourceImages, as_nchw, numbered

BRIGHTEST = 16  # digits count ink on a scale of 0 to 16


class Digits(Settings):
    """The embedded default."""

    kind: Literal["digits"]

    def read(self) -> SourceImages:
        """All 1797 digits, 1 x 8 x 8."""
        from sklearn.datasets import load_digits  # takes seconds to import, and only this source needs it

        digits = load_digits()
        images = np.round(digits.images / BRIGHTEST * 255).astype(np.uint8)
        return SourceImages(Labelled(as_nchw(images), digits.target.astype(np.int64)), None, numbered(10))

"""scikit-learn's digits: 1797 handwritten digits of 8x8 pixels, included in scikit-learn, no download."""

from typing import Literal

import numpy as np

from advmoe.core.settings import Settings
from advmoe.data.images import LabelledImages, SourceImages, as_nchw, numbered_class_names

MAX_INTENSITY = 16  # pixel values range from 0 to 16


class Digits(Settings):
    """scikit-learn's digits, the default data set."""

    kind: Literal["digits"]

    def read(self) -> SourceImages:
        """Returns all 1797 digits, 1 x 8 x 8."""
        from sklearn.datasets import load_digits  # a slow import that only this source needs

        digits = load_digits()
        images = np.round(digits.images / MAX_INTENSITY * 255).astype(np.uint8)
        return SourceImages(
            LabelledImages(as_nchw(images), digits.target.astype(np.int64)), None, numbered_class_names(10)
        )

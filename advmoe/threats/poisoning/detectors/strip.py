"""STRIP (Gao et al. 2019, arXiv 1902.06531): an image with a trigger keeps its class when other images are blended in.

Images are added and clipped at 1, as in the authors' code: averaging them would halve the trigger's intensity, and a
network trained on the full intensity would no longer react to it.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Settings
from advmoe.threats.poisoning.detectors.inputs import DetectorInputs, apply_in_batches


class Strip(Settings):
    """`blends`: number of clean images that are blended into every image; an image is flagged if the mean entropy of
    its predictions is below the `false_positives` quantile of held-out clean images.
    """

    kind: Literal["strip"]
    blends: PositiveInt
    false_positives: Annotated[float, Field(gt=0, lt=1)]


def strip(inputs: DetectorInputs, settings: Strip) -> Tensor:
    """Flags (N,) the training images. Raises UserError when there are fewer than two clean images."""
    return StripDetector(inputs, settings).flag(inputs.train.images)


class StripDetector:
    """STRIP with a threshold from clean images; flags training images or inputs at test time.

    Raises UserError when there are fewer than two clean images.
    """

    def __init__(self, inputs: DetectorInputs, settings: Strip) -> None:
        self.inputs, self.settings = inputs, settings
        # one half of the clean images is blended in, the other sets the threshold: none is blended with itself
        half = len(inputs.clean) // 2
        if not half:
            raise UserError("strip needs at least two validation images: one to blend in, one to set its threshold")
        self.overlays = inputs.clean.pixels()[:half]
        entropies = self._entropies(inputs.clean.pixels()[half:])
        self.threshold = float(entropies.quantile(settings.false_positives))

    def flag(self, images_NCHW: Tensor) -> Tensor:
        """Returns which of the uint8 images (N,) have a mean entropy below the threshold."""
        return self._entropies(images_NCHW.float() / 255) < self.threshold

    def _entropies(self, pixels_NCHW: Tensor) -> Tensor:
        """Returns the mean entropy in nats (N,) of the predictions on images with clean images blended in."""
        victim = self.inputs.victim
        rows_TN = torch.randint(
            len(self.overlays), (self.settings.blends, len(pixels_NCHW)), generator=self.inputs.stream
        )
        total = torch.zeros(len(pixels_NCHW))
        for rows_N in rows_TN:
            blended = (pixels_NCHW + self.overlays[rows_N]).clamp_max(1)
            total += apply_in_batches(victim, blended, lambda batch: _entropy(victim, batch))
        return total / self.settings.blends


def _entropy(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    probabilities_BK = torch.softmax(model(images_BCHW), dim=1)
    entropy: Tensor = -torch.special.xlogy(probabilities_BK, probabilities_BK).sum(dim=1)
    return entropy

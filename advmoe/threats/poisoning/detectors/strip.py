"""STRIP (Gao et al. 2019, arXiv 1902.06531): an image with a trigger keeps its class whatever is laid over it.

Images are added and cut at full intensity, as in the authors' code: their mean would halve the trigger, and networks
that know it at full intensity only would no longer answer to it.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.core.settings import PositiveInt, Settings
from advmoe.threats.poisoning.detectors.evidence import Evidence, read_all


class StripDetector(Settings):
    """`blends` of every image, each with a clean one; an image is flagged if the mean entropy of the answers is lower
    than a share `false_positives` of held-out clean images have.
    """

    kind: Literal["strip"]
    blends: PositiveInt
    false_positives: Annotated[float, Field(gt=0, lt=1)]


def strip(evidence: Evidence, settings: StripDetector) -> Tensor:
    """Flags (N,)."""
    return Strainer(evidence, settings).flags(evidence.train.images)


class Strainer:
    """STRIP with its threshold set; it judges training images as well as inputs.

    Raises UserError when there are fewer than two clean images.
    """

    def __init__(self, evidence: Evidence, settings: StripDetector) -> None:
        self.evidence, self.settings = evidence, settings
        # a half of the clean images is blended in, the other sets the threshold: none is blended with itself
        half = len(evidence.clean) // 2
        if not half:
            raise UserError("strip needs at least two validation images: one to blend in, one to set its threshold")
        self.overlays = evidence.clean.pixels()[:half]
        entropies = self._entropies(evidence.clean.pixels()[half:])
        self.threshold = float(entropies.quantile(settings.false_positives))

    def flags(self, images_NCHW: Tensor) -> Tensor:
        """Which of the uint8 images (N,) answer too steadily."""
        return self._entropies(images_NCHW.float() / 255) < self.threshold

    def _entropies(self, pixels_NCHW: Tensor) -> Tensor:
        """Mean entropy in nats (N,) of the answers to an image with clean ones laid over it."""
        victim = self.evidence.victim
        picks = torch.randint(
            len(self.overlays), (self.settings.blends, len(pixels_NCHW)), generator=self.evidence.stream
        )
        total = torch.zeros(len(pixels_NCHW))
        for pick in picks:
            blended = (pixels_NCHW + self.overlays[pick]).clamp_max(1)
            total += read_all(victim, blended, lambda batch: _entropy(victim, batch))
        return total / self.settings.blends


def _entropy(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    shares_BK = torch.softmax(model(images_BCHW), dim=1)
    nats: Tensor = -torch.special.xlogy(shares_BK, shares_BK).sum(dim=1)
    return nats

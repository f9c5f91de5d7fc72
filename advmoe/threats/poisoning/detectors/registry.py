"""Registry of detectors. To add one, add its file, an entry in the union and a case below."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from advmoe.core.settings import Settings
from advmoe.threats.poisoning.detectors.clustering import Clustering, clustering
from advmoe.threats.poisoning.detectors.inputs import DetectorInputs
from advmoe.threats.poisoning.detectors.spectral import Spectral, spectral
from advmoe.threats.poisoning.detectors.strip import Strip, strip


class Oracle(Settings):
    """Flags exactly the poisoned images: no defence, but an upper bound for all detectors."""

    kind: Literal["oracle"]


AnyDetector = Spectral | Clustering | Strip | Oracle
Detector = Annotated[AnyDetector, Field(discriminator="kind")]


def flag_poison(inputs: DetectorInputs, settings: AnyDetector, is_poison_N: Tensor) -> Tensor:
    """Returns which training images (N,) a detector flags as poison; only the oracle uses `is_poison` (N,)."""
    match settings:
        case Spectral():
            return spectral(inputs, settings)
        case Clustering():
            return clustering(inputs, settings)
        case Strip():
            return strip(inputs, settings)
        case Oracle():
            return is_poison_N.clone()

"""All defences by name. A new one is a file beside this, a line in the union and a case below."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from advmoe.core.settings import Settings
from advmoe.threats.poisoning.detectors.clustering import Clustering, clustering
from advmoe.threats.poisoning.detectors.evidence import Evidence
from advmoe.threats.poisoning.detectors.spectral import Spectral, spectral
from advmoe.threats.poisoning.detectors.strip import StripDetector, strip


class Oracle(Settings):
    """Flags exactly what was poisoned: no defence, but the upper bound of all."""

    kind: Literal["oracle"]


AnyDefence = Spectral | Clustering | StripDetector | Oracle
Defence = Annotated[AnyDefence, Field(discriminator="kind")]


def flag(evidence: Evidence, settings: AnyDefence, is_poison_N: Tensor) -> Tensor:
    """Which training images (N,) the defence takes for poison; only the oracle looks at `is_poison` (N,)."""
    match settings:
        case Spectral():
            return spectral(evidence, settings)
        case Clustering():
            return clustering(evidence, settings)
        case StripDetector():
            return strip(evidence, settings)
        case Oracle():
            return is_poison_N.clone()

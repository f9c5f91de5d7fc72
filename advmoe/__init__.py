"""advmoe: robust image classifiers from a mixture of adversarially trained experts, and the evidence for them."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from torch import nn

__version__ = version("advmoe")


def load_model(path: str | PathLike[str]) -> nn.Module:
    """A ready `nn.Module` from an artifact: pixels in [0, 1], (B, C, H, W), in, log-probabilities (B, K) out.

    Raises ValueError with one sentence if the file is missing, damaged or no classifier of this project.
    """
    from pathlib import Path  # imported here, torch above all, so that `advmoe --help` stays quick

    from advmoe.models import classifiers

    return classifiers.with_log_softmax(classifiers.load(Path(path)))

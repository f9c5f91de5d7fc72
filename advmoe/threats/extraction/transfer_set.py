"""What an attacker learned by asking: images with the victim's answers. Asked once, saved, and only then trained on.

Shapes: N images, C channel, H/W pixels, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.data.dataset import Split
from advmoe.threats.extraction.oracle import Oracle

KIND = "transfer-set"


@dataclass(frozen=True)
class TransferSet:
    """`images` (N, C, H, W) uint8 and `answers` (N, K), in the order in which they were asked; `queries` (N,): how many
    had been paid when an image was answered, 0 for images whose labels the attacker had anyway.
    """

    images: Tensor
    answers: Tensor
    queries: Tensor

    def within(self, budget: int) -> "TransferSet":
        """What a smaller budget would have bought."""
        paid = self.queries <= budget
        return TransferSet(self.images[paid], self.answers[paid], self.queries[paid])


def asked(oracle: Oracle, images_NCHW: Tensor) -> TransferSet:
    """Ask about uint8 images and keep the answers. Raises UserError when the budget does not cover them."""
    already = oracle.used
    answers = oracle.ask(images_NCHW)
    return TransferSet(images_NCHW, answers, already + torch.arange(1, len(images_NCHW) + 1))


def labelled(split: Split, classes: int) -> TransferSet:
    """Images whose true labels the attacker has anyway: no query was paid for them."""
    answers = functional.one_hot(split.labels, classes).float()
    return TransferSet(split.images, answers, torch.zeros(len(split), dtype=torch.int64))


def joined(first: TransferSet, second: TransferSet) -> TransferSet:
    """One after the other."""
    return TransferSet(
        torch.cat([first.images, second.images]),
        torch.cat([first.answers, second.answers]),
        torch.cat([first.queries, second.queries]),
    )


def save(
    path: Path,
    found: TransferSet,
    log: Sequence[str],
    *,
    about: Mapping[str, Any],
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    seconds: float,
) -> str:
    """Write the set as an artifact, with the oracle's `log` of what was asked; returns its content hash."""
    names = torch.tensor([list(bytes.fromhex(digest)) for digest in log], dtype=torch.uint8)
    tensors = {"images": found.images, "answers": found.answers, "queries": found.queries, "log": names}
    written = artifacts.save(
        path, KIND, tensors, about=about, params=params, inputs=inputs, seed=seed, metrics={}, seconds=seconds
    )
    return written.sha256


def load(path: Path) -> TransferSet:
    """Read a transfer set. Raises UserError if it is missing, damaged or not one."""
    tensors = artifacts.load(path, KIND).tensors
    try:
        found = TransferSet(tensors["images"], tensors["answers"], tensors["queries"])
    except KeyError as error:
        raise UserError(f"{path}: has no tensor {error}; build it again") from error
    if not _fits(found):
        raise UserError(f"{path}: its tensors do not belong together; build it again")
    return found


def _fits(found: TransferSet) -> bool:
    rows = found.queries.shape
    types = (found.images.dtype, found.answers.dtype, found.queries.dtype)
    dimensions = (found.images.ndim, found.answers.ndim, found.queries.ndim)
    return (
        types == (torch.uint8, torch.float32, torch.int64)
        and dimensions == (4, 2, 1)
        and found.images.shape[:1] == found.answers.shape[:1] == rows
        and bool(found.answers.isfinite().all())
    )

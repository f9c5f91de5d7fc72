"""Transfer sets: query images with the victim's answers, saved before any surrogate is trained on them.

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
    """`images` (N, C, H, W) uint8 and `answers` (N, K) in query order; `queries` (N,): the number of queries sent up to
    and including an image, 0 for images with true labels, which cost no query.
    """

    images: Tensor
    answers: Tensor
    queries: Tensor

    def within_budget(self, budget: int) -> "TransferSet":
        """Returns the part that a budget of that many queries covers."""
        covered = self.queries <= budget
        return TransferSet(self.images[covered], self.answers[covered], self.queries[covered])


def query(oracle: Oracle, images_NCHW: Tensor) -> TransferSet:
    """Queries uint8 images (N, C, H, W). Raises UserError when the budget does not cover them."""
    used = oracle.used
    answers = oracle.query(images_NCHW)
    return TransferSet(images_NCHW, answers, used + torch.arange(1, len(images_NCHW) + 1))


def from_labels(split: Split, classes: int) -> TransferSet:
    """Returns a split with one-hot true labels as a transfer set that cost no queries."""
    answers = functional.one_hot(split.labels, classes).float()
    return TransferSet(split.images, answers, torch.zeros(len(split), dtype=torch.int64))


def concatenate(first: TransferSet, second: TransferSet) -> TransferSet:
    """Concatenates two transfer sets."""
    return TransferSet(
        torch.cat([first.images, second.images]),
        torch.cat([first.answers, second.answers]),
        torch.cat([first.queries, second.queries]),
    )


def save(
    path: Path,
    transfer_set: TransferSet,
    query_log: Sequence[str],
    *,
    about: Mapping[str, Any],
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    seconds: float,
) -> str:
    """Saves a transfer set and the oracle's `query_log` as an artifact. Returns its content hash."""
    log = torch.tensor([list(bytes.fromhex(digest)) for digest in query_log], dtype=torch.uint8)
    tensors = {
        "images": transfer_set.images,
        "answers": transfer_set.answers,
        "queries": transfer_set.queries,
        "log": log,
    }
    written = artifacts.save(
        path, KIND, tensors, about=about, params=params, inputs=inputs, seed=seed, metrics={}, seconds=seconds
    )
    return written.sha256


def load(path: Path) -> TransferSet:
    """Loads a transfer set. Raises UserError if the file is missing, damaged or of another kind."""
    tensors = artifacts.load(path, KIND).tensors
    try:
        transfer_set = TransferSet(tensors["images"], tensors["answers"], tensors["queries"])
    except KeyError as error:
        raise UserError(f"{path}: has no tensor {error}; build it again") from error
    if not _is_consistent(transfer_set):
        raise UserError(f"{path}: its tensors have inconsistent shapes, types or values; build it again")
    return transfer_set


def _is_consistent(transfer_set: TransferSet) -> bool:
    rows = transfer_set.queries.shape
    types = (transfer_set.images.dtype, transfer_set.answers.dtype, transfer_set.queries.dtype)
    dimensions = (transfer_set.images.ndim, transfer_set.answers.ndim, transfer_set.queries.ndim)
    return (
        types == (torch.uint8, torch.float32, torch.int64)
        and dimensions == (4, 2, 1)
        and transfer_set.images.shape[:1] == transfer_set.answers.shape[:1] == rows
        and bool(transfer_set.answers.isfinite().all())
    )

"""Saves the finished batches of an attack, so that a killed evaluation can resume.

The result for an image depends only on the model, the image, the attack, the ball and the seed, so a saved batch is
valid for any batch size. Another version of the code or another machine starts again. A file whose content is not valid
for the attack is ignored even if its checksum matches, and its images are attacked again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor

from advmoe.attacks.ball import Ball
from advmoe.core import console
from advmoe.core.errors import UserError
from advmoe.core.files import canonical_json
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.checkpoints.workdir import WorkDir

PROJECTION_TOLERANCE = 1e-6  # in pixel units: the largest change when an image in the ball is projected again


@dataclass(frozen=True)
class FinishedBatch:
    """One finished batch: `rows` (b,), adversarial images (b, C, H, W), `overshoot` (b,) bool, passes and seconds."""

    rows: Tensor
    images: Tensor
    overshoot: Tensor
    forward: int
    backward: int
    seconds: float


class BatchCost(BaseModel):
    """Cost of a batch, as stored in the file: passes, in images, and seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    forward: NonNegativeInt
    backward: NonNegativeInt
    seconds: NonNegativeFloat


class BatchStore:
    """Stores the finished batches of one attack on one model, in a work directory named after `facts`."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.work_dir = WorkDir.of("evaluate", canonical_json(facts))
        self.writable = True

    def load(self, images_NCHW: Tensor, ball: Ball) -> list[FinishedBatch]:
        """Returns the saved batches of these images, no image twice; invalid files are ignored with a warning."""
        missing_N = torch.ones(len(images_NCHW), dtype=torch.bool)
        batches = []
        for path in sorted(self.work_dir.folder.glob("*.safetensors")):
            batch = self._read(path, images_NCHW, ball, missing_N)
            if batch is not None:
                missing_N[batch.rows] = False
                batches.append(batch)
        return batches

    def add(self, batch: FinishedBatch) -> None:
        """Saves one batch, unless another process holds the lock or the disk cannot be written."""
        self.writable = self.writable and workdir.try_lock(self.work_dir)
        if not self.writable:
            return
        tensors = {"rows": batch.rows, "images": batch.images, "overshoot": batch.overshoot}
        values = {"forward": batch.forward, "backward": batch.backward, "seconds": batch.seconds}
        file = self.work_dir.folder / f"{int(batch.rows[0]):08d}-{len(batch.rows)}.safetensors"
        self.writable = storage.save_checkpoint(file, Checkpoint(tensors, values))

    def clear(self) -> None:
        """Deletes the saved batches."""
        if self.work_dir.folder.exists() and workdir.try_lock(self.work_dir):
            self.work_dir.remove()

    def _read(self, path: Path, images_NCHW: Tensor, ball: Ball, missing_N: Tensor) -> FinishedBatch | None:
        try:
            checkpoint = storage.load_checkpoint(path)
            return None if checkpoint is None else _parse_batch(path, checkpoint, images_NCHW, ball, missing_N)
        except UserError as error:
            console.warn(f"{error} and ignored; its images are attacked again")
            return None


def _parse_batch(
    path: Path, checkpoint: Checkpoint, images_NCHW: Tensor, ball: Ball, missing_N: Tensor
) -> FinishedBatch:
    """Raises UserError for content that `BatchStore.add` does not write for these images."""
    invalid = UserError(f"{path} is not a batch of this attack")
    try:
        batch = FinishedBatch(**checkpoint.tensors, **BatchCost.model_validate(checkpoint.values).model_dump())  # type: ignore[arg-type]
    except (TypeError, ValidationError) as error:
        raise invalid from error
    if not _valid_rows(batch.rows, missing_N) or not _valid_images(batch, images_NCHW[batch.rows].cpu(), ball):
        raise invalid
    return batch


def _valid_rows(rows: Tensor, missing_N: Tensor) -> bool:
    is_index = rows.dtype == torch.int64 and rows.ndim == 1 and len(rows) > 0
    return (
        is_index
        and bool(((rows >= 0) & (rows < len(missing_N))).all())
        and len(set(rows.tolist())) == len(rows)
        and bool(missing_N[rows].all())
    )


def _valid_images(batch: FinishedBatch, clean_BCHW: Tensor, ball: Ball) -> bool:
    return (
        batch.overshoot.dtype == torch.bool
        and batch.overshoot.shape == batch.rows.shape
        and batch.images.dtype in {torch.float32, torch.float64}
        and batch.images.shape == clean_BCHW.shape
        and bool(((ball.project(batch.images, clean_BCHW) - batch.images).abs() <= PROJECTION_TOLERANCE).all())
    )

"""What a killed evaluation had already found, batch by batch, so that it goes on where it was.

What an attack finds for an image depends on nothing but the model, the image, the attack, the ball and the seed, so a
finished batch can be taken as it is, whatever the batch size was. Code and machine count too: others start anew.
A batch that cannot be one of this attack, whatever its checksum says, is attacked again.
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

ROUNDING = 1e-6  # of the pixel range: as far as an image in the ball moves when it is projected once more


@dataclass(frozen=True)
class FinishedBatch:
    """One finished batch: `rows` (b,), their adversarial images (b, C, H, W), and what they cost."""

    rows: Tensor
    images: Tensor
    overshoot: Tensor
    forward: int
    backward: int
    seconds: float


class Spent(BaseModel):
    """What a batch cost, as it stands in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    forward: NonNegativeInt
    backward: NonNegativeInt
    seconds: NonNegativeFloat


class BatchStore:
    """The finished batches of one attack on one model."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.place = WorkDir.of("evaluate", canonical_json(facts))
        self.keeps = True

    def parts(self, images_NCHW: Tensor, ball: Ball) -> list[FinishedBatch]:
        """All that was finished on these images, each in one part; a file that cannot be of it is as good as none."""
        open_N = torch.ones(len(images_NCHW), dtype=torch.bool)
        found = []
        for path in sorted(self.place.folder.glob("*.safetensors")):
            part = self._read(path, images_NCHW, ball, open_N)
            if part is not None:
                open_N[part.rows] = False
                found.append(part)
        return found

    def add(self, part: FinishedBatch) -> None:
        """Keep one more batch, if nobody else is at the same work and the disk takes it."""
        self.keeps = self.keeps and workdir.try_lock(self.place)
        if not self.keeps:
            return
        tensors = {"rows": part.rows, "images": part.images, "overshoot": part.overshoot}
        values = {"forward": part.forward, "backward": part.backward, "seconds": part.seconds}
        file = self.place.folder / f"{int(part.rows[0]):08d}-{len(part.rows)}.safetensors"
        self.keeps = storage.save_checkpoint(file, Checkpoint(tensors, values))

    def clear(self) -> None:
        """Forget it all: the results are on record elsewhere."""
        if self.place.folder.exists() and workdir.try_lock(self.place):
            self.place.remove()

    def _read(self, path: Path, images_NCHW: Tensor, ball: Ball, open_N: Tensor) -> FinishedBatch | None:
        try:
            found = storage.load_checkpoint(path)
            return None if found is None else _part(path, found, images_NCHW, ball, open_N)
        except UserError as error:
            console.warn(f"{error} and left aside; its images are attacked again")
            return None


def _part(path: Path, found: Checkpoint, images_NCHW: Tensor, ball: Ball, open_N: Tensor) -> FinishedBatch:
    """Raises UserError for what `Store.add` does not write of these images."""
    alien = UserError(f"{path} is not as this attack writes it")
    try:
        part = FinishedBatch(**found.tensors, **Spent.model_validate(found.values).model_dump())  # type: ignore[arg-type]
    except (TypeError, ValidationError) as error:
        raise alien from error
    if not _are_rows(part.rows, open_N) or not _are_attacked(part, images_NCHW[part.rows].cpu(), ball):
        raise alien
    return part


def _are_rows(rows: Tensor, open_N: Tensor) -> bool:
    numbered = rows.dtype == torch.int64 and rows.ndim == 1 and len(rows) > 0
    return (
        numbered
        and bool(((rows >= 0) & (rows < len(open_N))).all())
        and len(set(rows.tolist())) == len(rows)
        and bool(open_N[rows].all())
    )


def _are_attacked(part: FinishedBatch, clean_BCHW: Tensor, ball: Ball) -> bool:
    return (
        part.overshoot.dtype == torch.bool
        and part.overshoot.shape == part.rows.shape
        and part.images.dtype in {torch.float32, torch.float64}
        and part.images.shape == clean_BCHW.shape
        and bool(((ball.project(part.images, clean_BCHW) - part.images).abs() <= ROUNDING).all())
    )

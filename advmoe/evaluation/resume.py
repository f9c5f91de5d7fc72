"""What a killed evaluation had already found, batch by batch, so that it goes on where it was.

What an attack finds for an image depends on nothing but the model, the image, the attack, the ball and the seed, so a
finished batch can be taken as it is, whatever the batch size was. The code counts too: another version starts anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from advmoe import console, state
from advmoe.errors import UserError
from advmoe.files import canonical_json
from advmoe.state import Place, Snapshot


@dataclass(frozen=True)
class Part:
    """One finished batch: `rows` (b,), their adversarial images (b, C, H, W), and what they cost."""

    rows: Tensor
    images: Tensor
    overshoot: Tensor
    forward: int
    backward: int
    seconds: float


class Store:
    """The finished batches of one attack on one model."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.place = Place.of("evaluate", canonical_json(facts))
        self.keeps = True

    def parts(self) -> list[Part]:
        """Everything that was finished; a file that cannot be read is as good as none."""
        found = [self._read(path) for path in sorted(self.place.folder.glob("*.safetensors"))]
        return [part for part in found if part is not None]

    def add(self, part: Part) -> None:
        """Keep one more batch, if nobody else is at the same work and the disk takes it."""
        self.keeps = self.keeps and state.taken(self.place)
        if not self.keeps:
            return
        tensors = {"rows": part.rows, "images": part.images, "overshoot": part.overshoot}
        values = {"forward": part.forward, "backward": part.backward, "seconds": part.seconds}
        file = self.place.folder / f"{int(part.rows[0]):08d}-{len(part.rows)}.safetensors"
        self.keeps = state.keep(file, Snapshot(tensors, values))

    def clear(self) -> None:
        """Forget it all: the results are on record elsewhere."""
        if self.place.folder.exists() and state.taken(self.place):
            self.place.remove()

    def _read(self, path: Path) -> Part | None:
        try:
            found = state.read(path)
        except UserError as error:
            console.warn(f"{error} and left aside; its images are attacked again")
            return None
        return Part(**found.tensors, **found.values) if found is not None else None  # type: ignore[arg-type]

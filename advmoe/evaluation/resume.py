"""What a killed evaluation had already found, batch by batch, so that it goes on where it was.

What an attack finds for an image depends on nothing but the model, the image, the attack, the ball and the seed, so a
finished batch can be taken as it is, whatever the batch size was. The code counts too: another version starts anew.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import advmoe
from advmoe import console, paths
from advmoe.files import canonical_json, write_bytes

KEY_LENGTH = 16  # hex digits of a folder's name


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
        key = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
        self.folder = paths.RESUME / code_digest()[:KEY_LENGTH] / key[:KEY_LENGTH]

    def parts(self) -> list[Part]:
        """Everything that was finished; a file that cannot be read is as good as none."""
        found = [self._read(path) for path in sorted(self.folder.glob("*.safetensors"))]
        return [part for part in found if part is not None]

    def add(self, part: Part) -> None:
        """Keep one more batch."""
        cost = torch.tensor([part.forward, part.backward, part.seconds], dtype=torch.float64)
        tensors = {"rows": part.rows, "images": part.images.contiguous(), "overshoot": part.overshoot, "cost": cost}
        write_bytes(self.folder / f"{int(part.rows[0]):08d}-{len(part.rows)}.safetensors", save(tensors))

    def clear(self) -> None:
        """Forget it all: the results are on record elsewhere. What other versions left behind nobody can use."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for other in paths.RESUME.glob("*"):
            if other.name != self.folder.parent.name:
                shutil.rmtree(other, ignore_errors=True)

    def _read(self, path: Path) -> Part | None:
        try:
            tensors = load(path.read_bytes())
            forward, backward, seconds = tensors["cost"].tolist()
            return Part(tensors["rows"], tensors["images"], tensors["overshoot"], int(forward), int(backward), seconds)
        except (OSError, SafetensorError, KeyError, ValueError):
            console.warn(f"{path} is damaged and left aside; its images are attacked again")
            return None


@lru_cache(maxsize=1)
def code_digest() -> str:
    """sha256 over this package's own source: results of another version are not taken for this one's."""
    root = Path(advmoe.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()

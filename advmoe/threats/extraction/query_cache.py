"""A disk cache of a victim's answers: no image is sent to an external victim twice, also after an interruption."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError
from advmoe.core.files import write_bytes

FILE_NAME_LENGTH = 16  # hex digits of a file's name
DIGEST_BYTES = 32  # of a sha256


class QueryCache:
    """Stores one file per batch of answers in `folder`. Raises UserError when one of them is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                part = from_bytes(path.read_bytes())
                self.answers |= _answers_by_digest(part["digests"], part["answers"])
            except (SafetensorError, *MALFORMED_INPUT_ERRORS) as error:
                raise UserError(f"{path}: damaged; delete it to send its queries again") from error

    def lookup(self, digests: Sequence[str]) -> list[Tensor | None]:
        """Returns the answer (K,) to each image, None where it is not cached."""
        return [self.answers.get(digest) for digest in digests]

    def add(self, digests: Sequence[str], answers_NK: Tensor) -> None:
        """Adds answers (N, K) and writes them to disk atomically."""
        rows = torch.tensor([list(bytes.fromhex(digest)) for digest in digests], dtype=torch.uint8)
        content = to_bytes({"digests": rows, "answers": answers_NK.contiguous()})
        # named after its content: two processes may query the same victim
        name = hashlib.sha256(content).hexdigest()[:FILE_NAME_LENGTH]
        write_bytes(self.folder / f"{name}.safetensors", content)
        self.answers |= dict(zip(digests, answers_NK, strict=True))


def _answers_by_digest(digests: Tensor, answers_NK: Tensor) -> dict[str, Tensor]:
    """Returns the answers by image digest. Raises ValueError for tensors that `QueryCache.add` does not write."""
    if digests.dtype != torch.uint8 or digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
        raise ValueError(f"digests of shape {tuple(digests.shape)}")
    if answers_NK.dtype != torch.float32 or answers_NK.ndim != 2 or not answers_NK.isfinite().all():
        raise ValueError(f"answers of shape {tuple(answers_NK.shape)}")
    return dict(zip((row.numpy().tobytes().hex() for row in digests), answers_NK, strict=True))

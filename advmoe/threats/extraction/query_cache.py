"""Answers that were paid for, on disk: a query that was asked once is never paid for again, not even after a kill."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from advmoe.core.errors import STUMBLES, UserError
from advmoe.core.files import write_bytes

NAME_LENGTH = 16  # hex digits of a file's name
DIGEST_BYTES = 32  # of a sha256


class QueryCache:
    """One file for each batch of answers in `folder`. Raises UserError when one of them is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                part = from_bytes(path.read_bytes())
                self.answers |= _paired(part["digests"], part["answers"])
            except (SafetensorError, *STUMBLES) as error:
                raise UserError(f"{path}: damaged; delete it to pay for its queries again") from error

    def known(self, digests: Sequence[str]) -> list[Tensor | None]:
        """The answer (K,) to each image, None where it was never asked."""
        return [self.answers.get(digest) for digest in digests]

    def add(self, digests: Sequence[str], answers_NK: Tensor) -> None:
        """Keep new ones, whole or not at all, before anything is done with them."""
        names = torch.tensor([list(bytes.fromhex(digest)) for digest in digests], dtype=torch.uint8)
        content = to_bytes({"digests": names, "answers": answers_NK.contiguous()})
        # named after its content: two processes may ask the same victim
        name = hashlib.sha256(content).hexdigest()[:NAME_LENGTH]
        write_bytes(self.folder / f"{name}.safetensors", content)
        self.answers |= dict(zip(digests, answers_NK, strict=True))


def _paired(digests: Tensor, answers_NK: Tensor) -> dict[str, Tensor]:
    """Answers by the digest of their image. Raises ValueError for tensors that `Paid.add` does not write."""
    if digests.dtype != torch.uint8 or digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
        raise ValueError(f"digests of shape {tuple(digests.shape)}")
    if answers_NK.dtype != torch.float32 or answers_NK.ndim != 2 or not answers_NK.isfinite().all():
        raise ValueError(f"answers of shape {tuple(answers_NK.shape)}")
    return dict(zip((row.numpy().tobytes().hex() for row in digests), answers_NK, strict=True))

"""Answers that were paid for, on disk: a query that was asked once is never paid for again, not even after a kill."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from advmoe.errors import UserError
from advmoe.files import write_bytes

NAME_LENGTH = 16  # hex digits of a file's name


class Paid:
    """One file for each batch of answers in `folder`. Raises UserError when one of them is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                part = from_bytes(path.read_bytes())
                digests = [row.numpy().tobytes().hex() for row in part["digests"]]
                self.answers |= dict(zip(digests, part["answers"], strict=True))
            except (SafetensorError, OSError, KeyError, ValueError) as error:
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

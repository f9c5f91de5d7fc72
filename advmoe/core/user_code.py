"""Code that a user names, `path/to/file.py:function`: the only place where advmoe runs code it did not ship.

Weights and data never get here: they are safetensors, npz without pickle, image files, or `.pt` under `weights_only`.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe.core.errors import UserError, first_line


def names_code(text: str) -> bool:
    """Whether `text` has the form `path/to/file.py:function`."""
    path, colon, function = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and function.isidentifier()


def load_function(reference: str) -> Callable[..., Any]:
    """Import the file and return the function. Raises UserError when either is missing or the import raises."""
    path, function = _split(reference)
    if not path.is_file():
        raise UserError(f"{reference}: no such file {path}")
    spec = importlib.util.spec_from_file_location(f"advmoe_user_{path.stem}_{digest(reference)[:8]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickled functions look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{reference}: importing {path} raised {first_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{reference}: {path} has no function '{function}'")
    return found  # type: ignore[no-any-return]


def call(reference: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call it. Whatever it raises becomes a UserError with one sentence."""
    try:
        return function(*arguments, **keywords)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{reference} raised {first_line(error)}") from error


def digest(reference: str) -> str:
    """sha256 of the file. Raises UserError when it cannot be read."""
    path, _ = _split(reference)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{reference}: no such file {path}") from error


def _split(reference: str) -> tuple[Path, str]:
    if not names_code(reference):
        raise UserError(f"{reference}: must have the form path/to/file.py:function")
    path, _, function = reference.rpartition(":")
    return Path(path), function

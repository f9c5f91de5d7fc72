"""Loading and calling of user functions, given as `path/to/file.py:function`.

This is the only place where advmoe runs code it does not ship. Weights and data are read without running code: as
safetensors, npz without pickle, image files, or `.pt` with `weights_only`.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe.core.errors import UserError, error_summary


def is_code_reference(text: str) -> bool:
    """Returns whether `text` has the form `path/to/file.py:function`."""
    path, colon, function = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and function.isidentifier()


def load_function(reference: str) -> Callable[..., Any]:
    """Imports the file and returns the function. Raises UserError when either is missing or the import raises."""
    path, function = _split(reference)
    if not path.is_file():
        raise UserError(f"{reference}: no such file {path}")
    spec = importlib.util.spec_from_file_location(f"advmoe_user_{path.stem}_{file_digest(reference)[:8]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickled functions need their module here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{reference}: importing {path} raised {error_summary(error)}") from error
    loaded = getattr(module, function, None)
    if not callable(loaded):
        raise UserError(f"{reference}: {path} has no function '{function}'")
    return loaded  # type: ignore[no-any-return]


def call(reference: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Calls `function`. Raises UserError, with `reference` in the message, for any exception it raises."""
    try:
        return function(*arguments, **keywords)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{reference} raised {error_summary(error)}") from error


def file_digest(reference: str) -> str:
    """Returns the sha256 of the file. Raises UserError when it cannot be read."""
    path, _ = _split(reference)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{reference}: no such file {path}") from error


def _split(reference: str) -> tuple[Path, str]:
    if not is_code_reference(reference):
        raise UserError(f"{reference}: must have the form path/to/file.py:function")
    path, _, function = reference.rpartition(":")
    return Path(path), function

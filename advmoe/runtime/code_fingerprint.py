"""Fingerprints of code: a hash over everything that a stage can run, without docstrings, comments and formatting.

DVC does not follow imports. The stage `code` writes one fingerprint per stage, and every stage depends on its own; the
checkpoints of a stage are keyed by the same fingerprint. It covers the import closure of `stages/STAGE.py`: each file
of this project that the stage imports, directly or not, at module level or inside a function, as its syntax tree, and
the data files (templates) of the packages among them. `advmoe/cli` is never part of it; `advmoe/core/console.py` and
the package's `__init__.py` are left out, because they cannot change a result.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import advmoe

PACKAGE = Path(advmoe.__file__).parent
STAGES = Path("stages")
EXCLUDED = {"advmoe/__init__.py", "advmoe/core/console.py"}
TOP_LEVEL = ("advmoe", "stages")

_current: list[str] = []  # the stage that this process runs; empty outside of stages


def stage_names(folder: Path = STAGES) -> list[str]:
    """Names of the stages that `folder` holds a file for, sorted."""
    return sorted(path.stem for path in folder.glob("[a-z]*.py"))


def stage_fingerprint(stage: str, folder: Path = STAGES, package: Path = PACKAGE) -> str:
    """Returns the sha256 over the code of a stage, as 64 hex digits."""
    return _hash_files(import_closure(folder / f"{stage}.py", package), package)


def set_stage(stage: str | None) -> None:
    """Sets the stage whose fingerprint keys the checkpoints of this process; None for all of the package."""
    _current[:] = [] if stage is None else [stage]
    code_fingerprint.cache_clear()


def current_stage() -> str | None:
    """Returns the stage that `set_stage` named, None without one."""
    return _current[0] if _current else None


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Returns the fingerprint of the current stage; outside of stages that of the whole package, `cli` left out."""
    stage = current_stage()
    if stage is not None and (STAGES / f"{stage}.py").is_file():
        return stage_fingerprint(stage)
    return package_fingerprint()


def package_fingerprint() -> str:
    """Returns the fingerprint of the whole package, `cli` left out."""
    files = {path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"}
    return _hash_files({path for path in files if _name(path, PACKAGE) not in EXCLUDED}, PACKAGE)


def import_closure(file: Path, package: Path = PACKAGE) -> set[Path]:
    """Returns `file` and every file of this project that it imports, directly or not."""
    closure: set[Path] = set()
    pending = {file}
    while pending:
        closure |= pending
        imported = {path for each in pending for path in _imported_files(each, package)}
        pending = imported - closure
    return {path for path in closure if _name(path, package) not in EXCLUDED}


def _imported_files(file: Path, package: Path) -> Iterator[Path]:
    """Yields the project files that the import statements of `file` name, packages as their `__init__.py`."""
    for module in _summary(file).imports:
        path = _module_file(module, file, package)
        if path is not None:
            yield path


def _module_file(module: str, importer: Path, package: Path) -> Path | None:
    """Returns the file of a module of this project, None for other modules and for packages without code."""
    top, *rest = module.split(".")
    if top not in TOP_LEVEL:
        return None
    base = (package if top == "advmoe" else importer.parent).joinpath(*rest)
    for candidate in (base.with_suffix(".py") if rest else base / "__init__.py", base / "__init__.py"):
        if candidate.is_file():
            return candidate if _summary(candidate).has_code else None
    return None


def _hash_files(files: set[Path], package: Path) -> str:
    digest = hashlib.sha256()
    for name, path in sorted((_name(path, package), path) for path in files | _data_files(files, package)):
        content = _summary(path).digest if path.suffix == ".py" else hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def _data_files(files: set[Path], package: Path) -> set[Path]:
    """Returns the data files, such as templates, in subfolders of the packages that contain `files`."""
    folders = {path.parent for path in files if path.is_relative_to(package) and path.parent != package}
    subfolders = {child for folder in folders for child in folder.iterdir() if child.is_dir()}
    found = (path for folder in subfolders for path in folder.glob("*") if path.is_file())
    return {path for path in found if path.suffix not in {".py", ".pyc"}}


def _name(path: Path, package: Path) -> str:
    return path.relative_to(package.parent).as_posix() if path.is_relative_to(package) else f"stages/{path.name}"


class _Summary(NamedTuple):
    """Of one file: the modules its imports name, a hash of its syntax tree, and whether it is more than a docstring."""

    imports: tuple[str, ...]
    digest: str
    has_code: bool


def _summary(path: Path) -> _Summary:
    return _summarise(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _summarise(path: Path, modified: int) -> _Summary:
    del modified  # part of the key: an edited file is read again
    tree = ast.parse(path.read_bytes())
    digest = hashlib.sha256(_canonical(tree).encode()).hexdigest()
    return _Summary(tuple(_imported_names(tree)), digest, has_code=len(tree.body) > 1)


def _imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def _canonical(node: object) -> str:
    """A syntax tree as text that is the same for every version of Python: fields without a value are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, _without_docstring(node, name, value)) for name, value in ast.iter_fields(node))
        shown = ",".join(f"{name}={_canonical(value)}" for name, value in fields if value not in (None, []))
        return f"{type(node).__name__}({shown})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def _without_docstring(node: ast.AST, field: str, value: object) -> object:
    """The body of a module, class or function without its docstring; every other value as it is."""
    has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if field == "body" and has_docstring and isinstance(value, list) and value and _is_string(value[0]):
        return value[1:]
    return value


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )

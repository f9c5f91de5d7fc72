"""Read-only access to the files of a run: in a project folder, a git revision or a DVC experiment.

Paths are relative to the root of the project; paths that lead out of it are refused.
"""

import csv
import io
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from advmoe.core.errors import UserError, error_summary
from advmoe.core.references import in_current_form
from advmoe.core.settings import PARAMS_FILE, parse_untrusted_yaml

CURRENT_FOLDER = Path()
WORKSPACE = "workspace"  # DVC's name for the current files
EXPERIMENT_REFS = "refs/exps"
# DVC stores an experiment under the commit it started from; its queues and stashes have other refs
EXPERIMENT_REF = re.compile(rf"{EXPERIMENT_REFS}/[0-9a-f]{{2}}/[0-9a-f]{{38,62}}/(?P<name>[^/]+)")
COMMIT_HASH = re.compile(r"[0-9a-f]{40,64}")


class MissingFileError(UserError):
    """A snapshot lacks a file. A file that exists but is malformed raises a plain UserError."""


class Snapshot(Protocol):
    """Files of one run of the project."""

    @property
    def name(self) -> str:
        """The name that the user gave."""

    def read(self, path: Path) -> bytes | None:
        """Returns the content of a file, or None if it is missing. Raises UserError for a path outside the project."""

    def files(self, folder: Path) -> list[str]:
        """Returns the sorted names of the files directly inside a folder; empty if the folder is missing."""


@dataclass(frozen=True)
class FolderSnapshot:
    """A project folder on disk, with its current content."""

    path: Path

    @property
    def name(self) -> str:
        """The path, or `workspace` for the current folder."""
        return WORKSPACE if self.path == CURRENT_FOLDER else str(self.path)

    def read(self, path: Path) -> bytes | None:
        """See Snapshot. Links are followed if they stay inside the folder."""
        file = self.path / _require_inside(path)
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{file}: is a link that leads out of {self.path}")
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error

    def files(self, folder: Path) -> list[str]:
        """See Snapshot."""
        directory = self.path / _require_inside(folder)
        return sorted(path.name for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []


class GitSnapshot:
    """The project at a commit, given by a branch, a tag, a hash, or the name of a DVC experiment.

    `commit` is the full hash, `root` the project's folder in the work tree. Raises UserError when the name is unknown
    or ambiguous, and outside a git repository.
    """

    def __init__(self, name: str, root: Path = CURRENT_FOLDER) -> None:
        self.name, self.root = name, root
        self.commit = _resolve(name, root)
        self._blobs = dict(_list_blobs(self.commit, root))

    def read(self, path: Path) -> bytes | None:
        """See Snapshot."""
        blob = self._blobs.get(_require_inside(path).as_posix())
        return None if blob is None else _git(self.root, "cat-file", "blob", blob)

    def files(self, folder: Path) -> list[str]:
        """See Snapshot."""
        directory = _require_inside(folder)
        return sorted(path.name for path in map(PurePath, self._blobs) if path.parent == directory)


def open_snapshot(name: str, root: Path = CURRENT_FOLDER) -> Snapshot:
    """Opens an existing folder, else a revision of the git repository at `root`. Raises UserError if it is neither."""
    if name == WORKSPACE and not Path(name).is_dir():
        return FolderSnapshot(CURRENT_FOLDER)
    if name and Path(name).is_dir():
        return FolderSnapshot(Path(name))
    try:
        return GitSnapshot(name, root)
    except UserError as error:
        raise UserError(f"{error}, and no folder of that name") from error


def commit_hash(snapshot: Snapshot) -> str | None:
    """Returns the full commit hash of a revision; None for a folder."""
    return snapshot.commit if isinstance(snapshot, GitSnapshot) else None


def list_experiments(root: Path = CURRENT_FOLDER) -> list[str]:
    """Returns the sorted names of the DVC experiments; the full ref where a name is ambiguous. Raises UserError."""
    refs = _experiment_refs(root)
    names = [_experiment_name(ref) for ref in refs]
    return sorted(name if names.count(name) == 1 else ref for name, ref in zip(names, refs, strict=True))


def read_required(snapshot: Snapshot, path: Path) -> bytes:
    """Returns the content of a file. Raises MissingFileError when it is missing."""
    content = snapshot.read(path)
    if content is None:
        raise MissingFileError(f"{snapshot.name}: has no {path}")
    return content


def read_json(snapshot: Snapshot, path: Path) -> Any:
    """Reads a JSON file. Raises MissingFileError when it is missing, UserError when it is malformed."""
    try:
        return json.loads(read_required(snapshot, path).decode(), parse_constant=_refuse_constant)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{snapshot.name}: {path} cannot be read as JSON ({error_summary(error)})") from error


def read_csv(snapshot: Snapshot, path: Path) -> list[dict[str, str]]:
    """Reads a CSV file with a header line. Raises MissingFileError when it is missing, UserError when malformed."""
    try:
        table = list(csv.reader(io.StringIO(read_required(snapshot, path).decode(), newline=""), strict=True))
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{snapshot.name}: {path} cannot be read as CSV ({error_summary(error)})") from error
    if not table or len(set(table[0])) != len(table[0]):
        raise UserError(f"{snapshot.name}: {path} needs a header line with distinct column names")
    for line, row in enumerate(table[1:], start=2):
        if len(row) != len(table[0]):
            raise UserError(f"{snapshot.name}: {path}, row {line} has {len(row)} cells for {len(table[0])} columns")
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def read_params(snapshot: Snapshot) -> dict[str, Any]:
    """Returns params.yaml in its current form, not validated: an old one may not match the schema.

    Raises MissingFileError, UserError.
    """
    try:
        content = parse_untrusted_yaml(read_required(snapshot, PARAMS_FILE).decode())
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{snapshot.name}: {PARAMS_FILE} is not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{snapshot.name}: {PARAMS_FILE} must be a mapping of sections")
    return in_current_form(content, f"{snapshot.name}: {PARAMS_FILE}")


def flatten_keys(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys, in order; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        leaves |= flatten_keys(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _require_inside(path: Path) -> Path:
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{path}: leads out of the project")
    return path


def _resolve(name: str, root: Path) -> str:
    """Returns the full hash of the commit that `name` refers to. Raises UserError if there is none, or several."""
    if not name or name.startswith("-") or "\0" in name:  # git would parse a dash as an option
        raise UserError(f"{name!r} is not a git revision")
    matches = {ref: _commit(ref, root) for ref in _experiment_refs(root) if _experiment_name(ref) == name}
    matches |= {f"revision {name}": _commit(name, root)}
    commits = {what: commit for what, commit in matches.items() if commit}
    if not commits:
        raise UserError(f"{name}: no git revision or DVC experiment of that name")
    if len(set(commits.values())) > 1:
        candidates = ", ".join(f"{what} ({commit[:10]})" for what, commit in commits.items())
        raise UserError(f"{name}: is ambiguous, use a hash: {candidates}")
    return next(iter(commits.values()))


def _commit(name: str, root: Path) -> str:
    """Returns the full hash of the commit, or an empty string for an unknown name."""
    output = (
        _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", allowed_codes=(0, 1, 128)).decode().strip()
    )
    return output if COMMIT_HASH.fullmatch(output) else ""  # a range gives two hashes


def _experiment_refs(root: Path) -> list[str]:
    refs = _git(root, "for-each-ref", "--format=%(refname)", EXPERIMENT_REFS).decode().splitlines()
    return [ref for ref in refs if EXPERIMENT_REF.fullmatch(ref)]


def _experiment_name(ref: str) -> str:
    return ref.rpartition("/")[2]


def _list_blobs(commit: str, root: Path) -> Iterator[tuple[str, str]]:
    """Yields path below `root` and hash of every regular file; links and submodules are left out."""
    for entry in _git(root, "ls-tree", "-r", "-z", commit).decode(errors="surrogateescape").split("\0"):
        mode_type_hash, _, path = entry.partition("\t")
        if mode_type_hash.startswith("100"):
            yield path, mode_type_hash.split()[2]


def _git(root: Path, *arguments: str, allowed_codes: tuple[int, ...] = (0,)) -> bytes:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"git: cannot be run in {root.absolute()} ({error.strerror or error})") from error
    if result.returncode not in allowed_codes:
        reason = result.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UserError(f"git: {reason[0].removeprefix('fatal: ')}")
    return result.stdout

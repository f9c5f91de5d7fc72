"""Where results are read from: a folder with a project in it, or a git revision, DVC's experiments included.

A record is only ever read. Its paths are relative to the root of the project, and none leads out of it.
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

from advmoe.core.errors import UserError, first_line
from advmoe.core.settings import PARAMS_FILE, parse_yaml

HERE = Path()
WORKSPACE = "workspace"  # DVC's word for the files as they are now
EXPERIMENTS = "refs/exps"
# DVC keeps an experiment under the commit it started from; queues and stashes of DVC look different
EXPERIMENT = re.compile(rf"{EXPERIMENTS}/[0-9a-f]{{2}}/[0-9a-f]{{38,62}}/(?P<name>[^/]+)")
HASH = re.compile(r"[0-9a-f]{40,64}")


class AbsentError(UserError):
    """A record does not have a file that was asked for; what is there but broken raises a plain UserError."""


class Snapshot(Protocol):
    """Files of one run of the project."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    def read(self, path: Path) -> bytes | None:
        """Content of a file; None when there is no such file. Raises UserError for a path that leads outside."""

    def files(self, folder: Path) -> list[str]:
        """Names of the files directly inside a folder, sorted; empty when there is no such folder."""


@dataclass(frozen=True)
class Folder:
    """A project's folder on disk, as it is at the moment of reading."""

    path: Path

    @property
    def name(self) -> str:
        """The path; `workspace` for the current folder."""
        return WORKSPACE if self.path == HERE else str(self.path)

    def read(self, path: Path) -> bytes | None:
        """See Record. A link is followed as long as it stays inside the folder."""
        file = self.path / _inside(path)
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{file}: is a link that leads out of {self.path}")
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error

    def files(self, folder: Path) -> list[str]:
        """See Record."""
        place = self.path / _inside(folder)
        return sorted(path.name for path in place.iterdir() if path.is_file()) if place.is_dir() else []


class Revision:
    """The project as a commit holds it: a branch, a tag, a hash, or the name of a DVC experiment.

    `commit` is the full hash. `root`: where in the work tree the project lies. Raises UserError when the name means
    nothing or several things, and when there is no git repository.
    """

    def __init__(self, name: str, root: Path = HERE) -> None:
        self.name, self.root = name, root
        self.commit = _resolve(name, root)
        self._blobs = dict(_blobs(self.commit, root))

    def read(self, path: Path) -> bytes | None:
        """See Record."""
        blob = self._blobs.get(_inside(path).as_posix())
        return None if blob is None else _git(self.root, "cat-file", "blob", blob)

    def files(self, folder: Path) -> list[str]:
        """See Record."""
        place = _inside(folder)
        return sorted(path.name for path in map(PurePath, self._blobs) if path.parent == place)


def open_snapshot(where: str, root: Path = HERE) -> Snapshot:
    """An existing folder, else a revision of the repository around `root`. Raises UserError when it is neither."""
    if where == WORKSPACE and not Path(where).is_dir():
        return Folder(HERE)
    if where and Path(where).is_dir():
        return Folder(Path(where))
    try:
        return Revision(where, root)
    except UserError as error:
        raise UserError(f"{error}; nor is there a folder of that name") from error


def commit_of(record: Snapshot) -> str | None:
    """The full hash of what a revision was read from; None for a folder, which nothing pins down."""
    return record.commit if isinstance(record, Revision) else None


def experiments(root: Path = HERE) -> list[str]:
    """The DVC experiments of a repository, sorted; the full ref where a name was used twice. Raises UserError."""
    refs = _experiment_refs(root)
    names = [_experiment_name(ref) for ref in refs]
    return sorted(name if names.count(name) == 1 else ref for name, ref in zip(names, refs, strict=True))


def need(record: Snapshot, path: Path) -> bytes:
    """Content of a file that must be there. Raises AbsentError."""
    content = record.read(path)
    if content is None:
        raise AbsentError(f"{record.name}: has no {path}")
    return content


def read_json(record: Snapshot, path: Path) -> Any:
    """Read a JSON file of a record. Raises AbsentError when it is missing, UserError when it is broken."""
    try:
        return json.loads(need(record, path).decode(), parse_constant=_refuse_constant)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record.name}: {path} cannot be read as JSON ({first_line(error)})") from error


def read_csv(record: Snapshot, path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header line. Raises AbsentError when it is missing, UserError when a row does not fit."""
    try:
        table = list(csv.reader(io.StringIO(need(record, path).decode(), newline=""), strict=True))
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{record.name}: {path} cannot be read as CSV ({first_line(error)})") from error
    if not table or len(set(table[0])) != len(table[0]):
        raise UserError(f"{record.name}: {path} needs a header line in which every column is named once")
    for line, row in enumerate(table[1:], start=2):
        if len(row) != len(table[0]):
            raise UserError(f"{record.name}: {path}, row {line} has {len(row)} cells for {len(table[0])} columns")
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def read_params(record: Snapshot) -> dict[str, Any]:
    """params.yaml of a record, unvalidated: an old one may not fit today's schema. Raises AbsentError, UserError."""
    try:
        content = parse_yaml(need(record, PARAMS_FILE).decode())
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{record.name}: {PARAMS_FILE} is not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{record.name}: {PARAMS_FILE} must be a mapping of sections")
    return content


def dotted(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under dotted keys, in order; a list or an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        leaves |= dotted(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _inside(path: Path) -> Path:
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{path}: leads out of the project")
    return path


def _resolve(name: str, root: Path) -> str:
    """The one commit that a name means."""
    if not name or name.startswith("-") or "\0" in name:  # git would take a dash for an option
        raise UserError(f"{name!r} is no git revision")
    meanings = {ref: _commit(ref, root) for ref in _experiment_refs(root) if _experiment_name(ref) == name}
    meanings |= {f"revision {name}": _commit(name, root)}
    found = {what: commit for what, commit in meanings.items() if commit}
    if not found:
        raise UserError(f"{name}: no git revision and no DVC experiment")
    if len(set(found.values())) > 1:
        candidates = ", ".join(f"{what} ({commit[:10]})" for what, commit in found.items())
        raise UserError(f"{name}: means several things, say which by its hash: {candidates}")
    return next(iter(found.values()))


def _commit(name: str, root: Path) -> str:
    """Full hash of the commit; empty when git does not know the name."""
    answer = _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", fine=(0, 1, 128)).decode().strip()
    return answer if HASH.fullmatch(answer) else ""  # a range gives two


def _experiment_refs(root: Path) -> list[str]:
    refs = _git(root, "for-each-ref", "--format=%(refname)", EXPERIMENTS).decode().splitlines()
    return [ref for ref in refs if EXPERIMENT.fullmatch(ref)]


def _experiment_name(ref: str) -> str:
    return ref.rpartition("/")[2]


def _blobs(commit: str, root: Path) -> Iterator[tuple[str, str]]:
    """Path below `root` and hash of every plain file; links and submodules are left out: nothing of theirs is here."""
    for entry in _git(root, "ls-tree", "-r", "-z", commit).decode(errors="surrogateescape").split("\0"):
        about, _, path = entry.partition("\t")
        if about.startswith("100"):
            yield path, about.split()[2]


def _git(root: Path, *arguments: str, fine: tuple[int, ...] = (0,)) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"git: cannot be run in {root.absolute()} ({error.strerror or error})") from error
    if done.returncode not in fine:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UserError(f"git: {reason[0].removeprefix('fatal: ')}")
    return done.stdout

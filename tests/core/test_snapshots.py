"""Snapshots: folders and revisions give the same files, and refuse paths that lead out of the project."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from advmoe.core import snapshots
from advmoe.core.errors import UserError
from advmoe.core.snapshots import FolderSnapshot, GitSnapshot, MissingFileError, Snapshot, open_snapshot

FILES = {
    "params.yaml": "seed: 0\nepsilon: 8/255\n",
    "metrics/verdict.json": '{"mixture": {"verdict": "pass"}}',
    "metrics/decisions/mixture.csv": "index,clean\n4,1\n7,0\n",
    "metrics/decisions/baseline.csv": "index,clean\n4,1\n7,0\n",
}
EMPTY = "0" * 38


def git(*arguments: str) -> str:
    """Runs git in the current folder, with a fixed author."""
    author = ("-c", "user.name=author", "-c", "user.email=author@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *author, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def commit(files: dict[str, str]) -> str:
    """Writes and commits files; returns the full hash."""
    write(files)
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "--message", "a run")
    return git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A git repository with one commit of FILES; the test runs inside. The commit's hash."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=main")
    return commit(FILES)


def experiment(name: str, seed: int, baseline: str = "ab") -> str:
    """Makes a commit that only an experiment's ref reaches, as DVC does; returns its hash."""
    before = git("rev-parse", "HEAD")
    made = commit({"params.yaml": f"seed: {seed}\nepsilon: 8/255\n"})
    git("reset", "--quiet", "--hard", before)
    git("update-ref", f"refs/exps/{baseline}/{EMPTY}/{name}", made)
    return made


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    "make", [lambda: FolderSnapshot(Path()), lambda: GitSnapshot("HEAD"), lambda: GitSnapshot("main")]
)
def test_folders_and_revisions_hold_the_same(make: Callable[[], Snapshot]) -> None:
    snapshot = make()
    assert {name: snapshot.read(Path(name)) for name in FILES} == {name: text.encode() for name, text in FILES.items()}
    assert snapshot.files(Path("metrics")) == ["verdict.json"]
    assert snapshot.files(Path("metrics/decisions")) == ["baseline.csv", "mixture.csv"]
    assert snapshot.files(Path("plots")) == []
    assert snapshot.read(Path("metrics/evaluate.json")) is None
    assert snapshot.read(Path("metrics")) is None
    assert snapshot.read(Path("params.yaml/deeper")) is None


def test_a_revision_does_not_contain_later_changes(repository: str) -> None:
    write({"params.yaml": "seed: 9\n", "metrics/new.json": "{}"})
    assert snapshots.read_params(GitSnapshot("HEAD")) == {"seed": 0, "epsilon": "8/255"}
    assert GitSnapshot("HEAD").read(Path("metrics/new.json")) is None
    assert snapshots.read_params(FolderSnapshot(Path())) == {"seed": 9}
    commit({"params.yaml": "seed: 10\n"})
    git("tag", "before", repository)
    assert [GitSnapshot(name).commit for name in ("before", repository, repository[:8], "HEAD~1")] == [repository] * 4


@pytest.mark.usefixtures("repository")
def test_a_project_may_be_a_subfolder_of_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit({"inner/params.yaml": "seed: 5\n", "inner/metrics/a.json": "{}"})
    assert snapshots.read_params(GitSnapshot("HEAD", Path("inner"))) == {"seed": 5}
    monkeypatch.chdir(tmp_path / "inner")
    assert snapshots.read_params(GitSnapshot("HEAD")) == {"seed": 5}
    assert GitSnapshot("HEAD").files(Path("metrics")) == ["a.json"]


@pytest.mark.usefixtures("repository")
def test_experiments_are_opened_by_their_name() -> None:
    made = experiment("brown-gyre", 3)
    git("update-ref", "refs/exps/stash", made)
    git("update-ref", "refs/exps/celery/stash", made)
    git("update-ref", "refs/exps/exec/EXEC_HEAD", made)
    assert snapshots.list_experiments() == ["brown-gyre"]
    snapshot = GitSnapshot("brown-gyre")
    assert (snapshot.name, snapshot.commit, snapshots.commit_hash(snapshot)) == ("brown-gyre", made, made)
    assert snapshots.read_params(snapshot)["seed"] == 3
    assert snapshots.commit_hash(FolderSnapshot(Path())) is None


@pytest.mark.usefixtures("repository")
def test_an_ambiguous_name_lists_its_candidates() -> None:
    first, second = experiment("twin", 1, "ab"), experiment("twin", 2, "cd")
    with pytest.raises(UserError, match="twin: is ambiguous") as refused:
        open_snapshot("twin")
    for part in (f"refs/exps/ab/{EMPTY}/twin", f"refs/exps/cd/{EMPTY}/twin", first[:10], second[:10]):
        assert part in str(refused.value)
    assert snapshots.list_experiments() == [f"refs/exps/ab/{EMPTY}/twin", f"refs/exps/cd/{EMPTY}/twin"]
    assert [GitSnapshot(name).commit for name in snapshots.list_experiments()] == [first, second]


def test_a_branch_of_the_same_commit_is_not_ambiguous(repository: str) -> None:
    made = experiment("twin", 1)
    git("branch", "twin", made)
    assert GitSnapshot("twin").commit == made
    git("branch", "--force", "twin", repository)
    with pytest.raises(UserError, match="is ambiguous"):
        GitSnapshot("twin")


@pytest.mark.usefixtures("repository")
def test_a_folder_takes_precedence_over_a_revision() -> None:
    git("branch", "kept")
    assert isinstance(open_snapshot("kept"), GitSnapshot)
    Path("kept").mkdir()
    assert open_snapshot("kept") == FolderSnapshot(Path("kept"))
    assert open_snapshot("workspace") == FolderSnapshot(Path())
    assert open_snapshot(".").name == "workspace"


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    "name", ["nope", "", "-h", "--all", "--upload-pack=x", "HEAD..main", "HEAD:params.yaml", "a\0b"]
)
def test_a_name_that_is_neither_folder_nor_revision_is_refused(name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"(not a git revision|no git revision or DVC experiment of that name).*, and no folder of that name",
    ):
        open_snapshot(name)


def test_without_a_repository_opening_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"git: not a git repository.*, and no folder of that name"):
        open_snapshot("HEAD")
    with pytest.raises(UserError, match="git: not a git repository"):
        snapshots.list_experiments()


def test_without_git_opening_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git: cannot be run in"):
        open_snapshot("HEAD")


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("path", ["../secret.json", "/etc/passwd", "metrics/../../secret.json"])
def test_paths_outside_the_project_are_refused(path: str) -> None:
    Path("../secret.json").write_text("{}")
    for snapshot in (FolderSnapshot(Path()), GitSnapshot("HEAD")):
        with pytest.raises(UserError, match="leads out of the project"):
            snapshot.read(Path(path))
        with pytest.raises(UserError, match="leads out of the project"):
            snapshot.files(Path(path))


@pytest.mark.usefixtures("repository")
def test_links_outside_the_project_are_refused() -> None:
    Path("../secret.json").write_text('{"secret": 1}')
    Path("metrics/outside.json").symlink_to("../../secret.json")
    Path("metrics/inside.json").symlink_to("verdict.json")
    with pytest.raises(UserError, match="is a link that leads out"):
        FolderSnapshot(Path()).read(Path("metrics/outside.json"))
    assert FolderSnapshot(Path()).read(Path("metrics/inside.json")) == FILES["metrics/verdict.json"].encode()
    commit({})
    assert GitSnapshot("HEAD").files(Path("metrics")) == ["verdict.json"]
    assert GitSnapshot("HEAD").read(Path("metrics/outside.json")) is None


def test_tables_and_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"accuracy": [1, 0.5]}))
    (tmp_path / "a.csv").write_text('name,"a, b"\nx,1\n"y\nz",\n')
    snapshot = FolderSnapshot(tmp_path)
    assert snapshots.read_json(snapshot, Path("a.json")) == {"accuracy": [1, 0.5]}
    assert snapshots.read_csv(snapshot, Path("a.csv")) == [{"name": "x", "a, b": "1"}, {"name": "y\nz", "a, b": ""}]


BROKEN = [
    (snapshots.read_json, b"{", "cannot be read as JSON"),
    (snapshots.read_json, b'{"a": NaN}', "NaN is not a JSON number"),
    (snapshots.read_json, b"\xff", "cannot be read as JSON"),
    (snapshots.read_json, b"[" * 100_000, "cannot be read as JSON"),
    (snapshots.read_csv, b"", "needs a header line"),
    (snapshots.read_csv, b"a,a\n1,2\n", "distinct column names"),
    (snapshots.read_csv, b"a,b\n1,2\n1\n", "row 3 has 1 cells for 2 columns"),
    (snapshots.read_csv, b"a,b\n1,2,3\n", "row 2 has 3 cells for 2 columns"),
    (snapshots.read_csv, b'a,b\n"1,2\n', "cannot be read as CSV"),
    (snapshots.read_csv, b"\xff", "cannot be read as CSV"),
]


@pytest.mark.parametrize(("read", "content", "reason"), BROKEN)
def test_a_malformed_file_is_named(
    tmp_path: Path, read: Callable[[Snapshot, Path], object], content: bytes, reason: str
) -> None:
    (tmp_path / "results").write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        read(FolderSnapshot(tmp_path), Path("results"))
    assert str(refused.value).startswith(f"{tmp_path}: results")
    assert not isinstance(refused.value, MissingFileError)


@pytest.mark.parametrize("content", ["seed: [", "- 1\n", "", "a: 1\na: 2\n", "when: 2024-13-45\n"])
def test_malformed_params_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}: params.yaml (is not valid YAML|must be a mapping)"):
        snapshots.read_params(FolderSnapshot(tmp_path))


def test_params_are_read_in_the_dialect_of_dvc(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("gradient: 1e-6\nema: off\n")
    assert snapshots.read_params(FolderSnapshot(tmp_path)) == {"gradient": 1e-6, "ema": "off"}


@pytest.mark.parametrize(
    "read", [snapshots.read_json, snapshots.read_csv, lambda snapshot, _: snapshots.read_params(snapshot)]
)
def test_a_missing_file_raises_missing_file_error(tmp_path: Path, read: Callable[[Snapshot, Path], object]) -> None:
    with pytest.raises(MissingFileError, match=rf"{tmp_path}: has no params.yaml"):
        read(FolderSnapshot(tmp_path), Path("params.yaml"))


def test_keys_are_flattened_to_leaves() -> None:
    nested = {"seed": 0, "model": {"kind": "cnn", "sizes": [1, {"a": 2}]}, "limits": {}, "grid": {0.1: {"x": None}}}
    assert snapshots.flatten_keys(nested) == {
        "seed": 0,
        "model.kind": "cnn",
        "model.sizes": [1, {"a": 2}],
        "limits": {},
        "grid.0.1.x": None,
    }


def test_snapshots_do_not_import_torch() -> None:
    code = "import sys, advmoe.core.snapshots, advmoe.statistics.decisions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

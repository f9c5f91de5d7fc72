"""Atomic writes, and JSON and CSV formats."""

import errno
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from advmoe.core import files
from advmoe.core.errors import UserError


def disk_is_full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects writes to /dev/full."""
    opened = tempfile.NamedTemporaryFile

    def onto_a_full_disk(*arguments: Any, **options: Any) -> Any:
        handle = opened(*arguments, **options)
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            os.dup2(full.fileno(), handle.fileno())
        return handle

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", onto_a_full_disk)


def names(folder: Path) -> list[str]:
    """Returns all names in a folder, including hidden partial files."""
    return sorted(entry.name for entry in folder.iterdir())


def test_bytes_are_written_and_missing_folders_created(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "file.bin"
    files.write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["file.bin"]


def test_a_result_can_be_read_by_others(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"something longer than what follows")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])  # during the write, at its end, and during the rename
def test_a_full_disk_leaves_the_old_file_and_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if step == "write":
        make_full(monkeypatch)
    else:
        monkeypatch.setattr(os, step, disk_is_full)
    with pytest.raises(UserError) as caught:
        files.write_bytes(path, b"new")
    assert str(caught.value) == f"{path}: could not be written (No space left on device); nothing was changed"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)  # root may write in spite of the mode
    with pytest.raises(UserError) as caught:
        files.write_bytes(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert str(caught.value) == f"{tmp_path}/file: could not be written (Read-only file system); nothing was changed"
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_no_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_reader_never_sees_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", list[bytes]()
    path.write_bytes(b"old")
    sync = os.fsync

    def fsync_and_read(handle: int) -> None:
        sync(handle)
        seen.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync_and_read)
    files.write_bytes(path, b"new")
    assert seen == [b"old"]  # the new content is on the disk, and the old file is still in place


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(UserError, match="folder/file: could not be written"):
        files.write_bytes(tmp_path / "folder" / "file", b"")


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match="file: could not be written"):
        files.write_bytes(tmp_path / "file", b"")
    assert names(tmp_path) == ["file"]


def test_text_is_utf_8(tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", "ε ≤ 8/255\n")
    assert (tmp_path / "file").read_bytes() == "ε ≤ 8/255\n".encode()


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.canonical_json({"b": [1, 2], "a": {"d": 1, "c": 2}}) == '{"a":{"c":2,"d":1},"b":[1,2]}'


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    value = {"b": 0.1, "a": [None, True, "x"]}
    files.write_json(tmp_path / "file", value)
    assert list(files.read_json(tmp_path / "file")) == ["b", "a"]
    assert files.read_json(tmp_path / "file") == value


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_refuses_nan(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "file", {"loss": number})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(number)
    assert names(tmp_path) == []


def test_csv_has_a_header_and_quotes_commas(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "file", [{"epoch": 1, "name": "a,b"}, {"epoch": 2, "name": "c"}])
    assert (tmp_path / "file").read_bytes() == b'epoch,name\n1,"a,b"\n2,c\n'


def test_reading_a_missing_json_names_it_and_says_what_builds_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file; `make repro` builds it"):
        files.read_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"not json"])
def test_reading_broken_json_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as JSON (")


def test_reading_a_folder_as_json_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as JSON"):
        files.read_json(tmp_path)


def test_names_are_joined_for_a_sentence() -> None:
    assert files.join_names(["a", 2, Path("c")]) == "a, 2, c"

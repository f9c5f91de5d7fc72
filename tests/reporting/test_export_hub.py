"""Exports for the Hub: bit-identical round trip, damaged files, atomic replacement."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_export_provenance import MIXTURE, ODD_NAMES, PLAIN, save_small
from torch import Tensor

import advmoe
from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.reporting.export import hub
from advmoe.reporting.export.hub import FILES, export_hub
from advmoe.reporting.export.provenance import Description

pretrained = pytest.importorskip("advmoe.reporting.export.pretrained", exc_type=ImportError)
TEXT = "---\nlicense: mit\n---\n# A mixture, für jeden\n"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return save_small(tmp_path / "made" / "mixture.safetensors")


@pytest.fixture
def exported(artifact: Path, tmp_path: Path) -> Path:
    export_hub(artifact, tmp_path / "out" / "robust", TEXT)
    return tmp_path / "out" / "robust"


def load(name: str | Path, **options: Any) -> Any:
    return pretrained.RobustClassifier.from_pretrained(name, **options)


def refusal(action: Callable[[], object]) -> str:
    """Returns the one-line message of a UserError."""
    with pytest.raises(UserError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", [MIXTURE, PLAIN], ids=lambda architecture: architecture.kind)
def test_a_loaded_export_gives_bit_identical_outputs(tmp_path: Path, architecture: Any) -> None:
    artifact = save_small(tmp_path / "model.safetensors", architecture)
    export_hub(artifact, tmp_path / "out", TEXT)
    model = load(tmp_path / "out")
    assert not model.training
    with torch.no_grad():
        answers_BK = model(images())
        assert torch.equal(answers_BK, advmoe.load_model(artifact)(images()))
    assert torch.allclose(answers_BK.exp().sum(dim=1), torch.ones(5))
    assert model.class_names == ODD_NAMES


def test_the_folder_holds_three_files_for_everybody_to_read(exported: Path) -> None:
    assert contents(exported).keys() == set(FILES)
    assert (exported / "README.md").read_text(encoding="utf-8") == TEXT
    config = json.loads((exported / "config.json").read_text())
    assert config["facts"]["class_names"] == list(ODD_NAMES)
    assert config["provenance"]["seed"] == 7
    assert exported.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in exported.parent.iterdir()] == ["robust"]  # nothing is left behind


def test_the_weights_are_the_artifact_itself(artifact: Path, exported: Path) -> None:
    assert (exported / "model.safetensors").read_bytes() == artifact.read_bytes()


def test_equal_input_gives_equal_bytes(artifact: Path, exported: Path, tmp_path: Path) -> None:
    export_hub(artifact, tmp_path / "again", TEXT)
    assert contents(tmp_path / "again") == contents(exported)


def test_save_pretrained_writes_the_same_files(exported: Path, tmp_path: Path) -> None:
    load(exported).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(exported)


def test_push_to_hub_uploads_the_same_files(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
            sent.update(repo=repo_id, files=contents(folder_path))
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    assert load(exported).push_to_hub("me/robust", token="mine") == "done"  # noqa: S106  (no secret)
    assert sent == {"token": "mine", "repo": "me/robust", "files": contents(exported)}


def test_a_repository_in_the_cache_of_the_hub_is_read(exported: Path, tmp_path: Path) -> None:
    repository, commit = tmp_path / "cache" / "models--me--robust", "c" * 40
    shutil.copytree(exported, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = load("me/robust", cache_dir=tmp_path / "cache", local_files_only=True)
    with torch.no_grad():
        assert torch.equal(model(images()), load(exported)(images()))


@pytest.mark.parametrize("name", ["me/nothing", "no/such/folder", "me/nothing/"])
def test_what_is_neither_folder_nor_repository_is_refused(name: str, tmp_path: Path) -> None:
    said = refusal(lambda: load(name, cache_dir=tmp_path, local_files_only=True))
    assert said.startswith(f"{name}: neither a folder nor an available model of the Hub")


def test_an_unknown_option_is_refused(exported: Path) -> None:
    assert "strict is not an option" in refusal(lambda: load(exported, strict=False))


def test_changed_weights_are_not_saved(exported: Path, tmp_path: Path) -> None:
    model = load(exported)
    with torch.no_grad():
        model.model.gate.score.bias += 1
    assert "the weights were changed after loading" in refusal(lambda: model.save_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file_is_refused(exported: Path, name: str) -> None:
    (exported / name).unlink()
    assert refusal(lambda: load(exported)) == f"{exported}: not an export of advmoe, {name} is missing"


def test_a_folder_without_its_card_is_read(exported: Path) -> None:
    (exported / "README.md").unlink()
    assert load(exported).class_names == ODD_NAMES


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda config: config.pop("facts"), "config.json: facts: is missing"),
        (lambda config: config.update(code="evil.py"), "config.json: code: is not a known key"),
        (lambda config: config["architecture"].update(kind="forest"), "config.json: architecture:"),
        (lambda config: config["facts"].update(class_names=["a", "b", "c"]), "does not describe the network"),
        (lambda config: config["architecture"]["gate"].update(temperature=2.0), "does not describe the network"),
        (lambda config: config["provenance"].update(sha256="0" * 64), "does not describe the network"),
        (lambda config: config["provenance"].update(header_sha256="0" * 64), "does not describe the network"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(exported: Path, edit: Callable[[Any], object], reason: str) -> None:
    edit_config(exported, edit)
    assert reason in refusal(lambda: load(exported))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"config"'])
def test_a_config_that_is_no_json_object_is_refused(exported: Path, text: str) -> None:
    (exported / "config.json").write_text(text)
    assert str(exported / "config.json") in refusal(lambda: load(exported))


def test_damaged_weights_are_refused(exported: Path) -> None:
    file = exported / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert "truncated" in refusal(lambda: load(exported))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not match its checksum" in refusal(lambda: load(exported))
    save_file({"weight": torch.zeros(1)}, file)
    assert "not written by advmoe" in refusal(lambda: load(exported))


def test_the_weights_of_another_export_are_refused(exported: Path, tmp_path: Path) -> None:
    other = save_small(tmp_path / "other.safetensors", seed=1)
    shutil.copy(other, exported / "model.safetensors")
    assert "config.json does not describe the network in model.safetensors" in refusal(lambda: load(exported))


def test_an_earlier_export_is_replaced_whole(exported: Path, tmp_path: Path) -> None:
    (exported / "README.md").unlink()
    export_hub(save_small(tmp_path / "other.safetensors", PLAIN), exported, "new")
    assert contents(exported).keys() == set(FILES)
    assert hub.read(exported).description.architecture == PLAIN
    assert [path.name for path in exported.parent.iterdir()] == ["robust"]


def test_an_empty_folder_is_filled(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_hub(artifact, tmp_path / "empty", TEXT)
    assert contents(tmp_path / "empty").keys() == set(FILES)


@pytest.mark.parametrize("name", ["thesis.txt", ".git", "README.md"])
def test_a_folder_of_the_users_own_is_left_alone(artifact: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    said = refusal(lambda: export_hub(artifact, tmp_path / "mine", TEXT))
    assert said.endswith("name a new or empty folder")
    assert contents(tmp_path / "mine") == {name: b"years of work"}


def test_a_file_added_to_an_earlier_export_is_not_lost(artifact: Path, exported: Path) -> None:
    (exported / "notes.txt").write_text("mine")
    before = contents(exported)
    assert "holds 'notes.txt'" in refusal(lambda: export_hub(artifact, exported, TEXT))
    assert contents(exported) == before


def test_a_config_of_somebody_else_is_no_earlier_export(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "bert"}')
    assert "neither empty nor an earlier export" in refusal(lambda: export_hub(artifact, tmp_path / "theirs", TEXT))


def test_a_file_in_the_place_of_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(lambda: export_hub(artifact, tmp_path / "file", TEXT))
    assert "could not be written" in refusal(lambda: export_hub(artifact, tmp_path / "file" / "below", TEXT))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(artifact: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(exported, target_is_directory=True)
    export_hub(artifact, tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (exported / "README.md").read_text() == "new"


def test_an_artifact_that_is_no_classifier_is_refused_before_anything_is_touched(
    exported: Path, tmp_path: Path
) -> None:
    thing = tmp_path / "thing.safetensors"
    artifacts.save(thing, "thing", {}, about={}, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    before = contents(exported)
    assert "holds a thing" in refusal(lambda: export_hub(thing, exported, TEXT))
    assert contents(exported) == before


class Killed(BaseException):
    """A BaseException, as raised when a process is interrupted."""


def stop(*_: object, **__: object) -> None:
    raise Killed


@pytest.mark.parametrize("step", ["write_bytes", "write_json", "write_text"])
def test_stopped_while_writing_the_old_export_stays_whole(
    artifact: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = contents(exported)
    monkeypatch.setattr(hub, step, stop)
    with pytest.raises(Killed):
        export_hub(artifact, exported, "new")
    assert contents(exported) == before
    assert [path.name for path in exported.parent.iterdir()] == ["robust"]


@pytest.mark.parametrize("failure", [OSError("no space left"), Killed()])
def test_stopped_between_the_renamings_the_old_export_stays_whole(
    artifact: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before, rename = contents(exported), Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises((UserError, Killed)):
        export_hub(artifact, exported, "new")
    assert contents(exported) == before
    assert [path.name for path in exported.parent.iterdir()] == ["robust"]


def test_without_the_extra_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "advmoe.reporting.export.pretrained")
    said = refusal(lambda: importlib.import_module("advmoe.reporting.export.pretrained"))
    assert said.startswith("huggingface_hub cannot be imported; install the export packages")
    assert said.endswith("pip install 'advmoe[export]'")


def test_a_folder_is_written_and_described_without_the_extra(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    export_hub(artifact, tmp_path / "out", TEXT)
    assert isinstance(hub.read(tmp_path / "out").description, Description)

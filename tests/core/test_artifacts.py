"""Artifacts: saving and loading, equal bytes for equal inputs, and detection of damage."""

import errno
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import advmoe
from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.data.dataset import DatasetInfo
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, GateSettings, MixtureArchitecture, PlainArchitecture
from advmoe.models.mixture import MixtureOfExperts

ABOUT: dict[str, Any] = {
    "about": {"names": ["a", "b"], "mean": 0.5},
    "params": {"lr": 0.1, "steps": [5, 10]},
    "inputs": {"dataset": "0" * 64},
    "seed": 7,
    "metrics": {"pgd": 0.25},
}
FACTS = DatasetInfo(
    channels=3, height=8, width=8, class_names=("a", "b", "c"), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
)
BACKBONE = BackboneSettings(kind="resnet18", width=2)
PLAIN = PlainArchitecture(kind="plain", backbone=BACKBONE)
MIXTURE = MixtureArchitecture(
    kind="mixture",
    backbone=BACKBONE,
    experts=("one", "two"),
    gate=GateSettings(width=2, temperature=1.5),
    mixing="probabilities",
)


def tensors() -> dict[str, Tensor]:
    """Returns tensors of all types in artifacts, including an empty one and a scalar."""
    stream = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 3, 2, 2, generator=stream),
        "images": torch.randint(0, 256, (2, 1, 3, 3), generator=stream, dtype=torch.uint8),
        "correct": torch.tensor([True, False, True]),
        "index": torch.zeros(0, dtype=torch.int64),
        "scalar": torch.tensor(1.5),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved artifact of kind 'thing'."""
    file = tmp_path / "thing.safetensors"
    artifacts.save(file, "thing", tensors(), **ABOUT, seconds=0.0)
    return file


def refusal(path: Path, kind: str | None = "thing") -> str:
    """Returns the error message of loading, without the file name with which it must start."""
    with pytest.raises(UserError) as caught:
        artifacts.load(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def raw_header(path: Path) -> dict[str, Any]:
    """Returns the safetensors header of the file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def rewrite(path: Path, **changes: object) -> None:
    """Saves the same tensors with a changed header."""
    header = artifacts.load(path).header.model_dump() | changes
    save_file(tensors(), path, {artifacts.METADATA_KEY: json.dumps(header)})


def test_tensors_and_header_are_loaded_as_saved(path: Path) -> None:
    loaded = artifacts.load(path, "thing")
    assert loaded.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert {key: getattr(loaded.header, key) for key in ABOUT} == ABOUT
    assert (loaded.header.kind, loaded.header.schema_version) == ("thing", artifacts.SCHEMA_VERSION)
    assert loaded.header.torch == torch.__version__


def test_save_returns_the_header_that_load_finds(tmp_path: Path) -> None:
    written = artifacts.save(tmp_path / "a.safetensors", "thing", tensors(), **ABOUT, seconds=0.0)
    assert artifacts.load(tmp_path / "a.safetensors").header == written


def test_equal_input_gives_equal_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    backwards = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in ABOUT.items()
    }
    for attempt in range(5):  # with several metadata keys safetensors gives five orders in five saves
        turned = dict(reversed(tensors().items())) if attempt % 2 else tensors()
        artifacts.save(again, "thing", turned, **(backwards if attempt % 2 else ABOUT), seconds=float(attempt))
        assert again.read_bytes() == path.read_bytes()


def test_the_memory_format_does_not_change_the_file(path: Path, tmp_path: Path) -> None:
    turned = tensors()
    turned["weight"] = turned["weight"].to(memory_format=torch.channels_last)
    assert not turned["weight"].is_contiguous()
    artifacts.save(tmp_path / "last.safetensors", "thing", turned, **ABOUT, seconds=0.0)
    assert (tmp_path / "last.safetensors").read_bytes() == path.read_bytes()


def test_the_header_has_one_metadata_key(path: Path) -> None:
    assert list(raw_header(path)["__metadata__"]) == [artifacts.METADATA_KEY]


@pytest.mark.parametrize("change", [{"seed": 8}, {"params": {"lr": 0.2}}, {"metrics": {}}])
def test_other_input_gives_other_bytes(path: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    artifacts.save(tmp_path / "other.safetensors", "thing", tensors(), **(ABOUT | change), seconds=0.0)
    assert (tmp_path / "other.safetensors").read_bytes() != path.read_bytes()


def test_the_hash_depends_on_names_types_shapes_and_contents() -> None:
    variants = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},  # the same bytes
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},  # equal as numbers
        {"a": torch.zeros(2), "b": torch.zeros(2)},
    ]
    assert len({artifacts.hash_tensors(variant) for variant in variants}) == len(variants)


def test_the_hash_does_not_depend_on_the_order_of_names() -> None:
    assert artifacts.hash_tensors(tensors()) == artifacts.hash_tensors(dict(reversed(tensors().items())))


def test_provenance_is_written_to_a_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "somebodys-laptop")
    file = tmp_path / "fgsm-1.safetensors"
    artifacts.save(file, "thing", tensors(), **ABOUT, seconds=12.345)
    provenance = json.loads((tmp_path / "fgsm-1.run.json").read_text())
    assert provenance["seconds"] == 12.3
    assert provenance["threads"] == torch.get_num_threads()
    assert {"commit", "dirty", "platform", "python"} <= provenance.keys()
    assert provenance["host"] == "somebodys-laptop"
    assert b"somebodys-laptop" not in file.read_bytes()


def test_saving_needs_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    artifacts.save(tmp_path / "a.safetensors", "thing", tensors(), **ABOUT, seconds=0.0)
    provenance = json.loads((tmp_path / "a.run.json").read_text())
    assert (provenance["commit"], provenance["dirty"]) == (None, None)


def test_a_missing_file_says_what_builds_it(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.safetensors").startswith("no such file; `dvc repro`")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith("not a safetensors file")


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -100, -1])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(path).startswith("not a safetensors file, or a truncated one")


def test_any_flipped_bit_of_the_tensors_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    stored = sum(tensor.nbytes for tensor in tensors().values())
    for position in range(8 + length, 8 + length + stored, 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert "does not match its checksum" in refusal(path)


def test_a_changed_header_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    changed = content.replace(rb"\"mean\":0.5", rb"\"mean\":0.7")
    assert changed != content
    path.write_bytes(changed)
    assert "checksum" in refusal(path)


def test_another_kind_is_refused(path: Path) -> None:
    assert refusal(path, "dataset") == "holds a thing, but a dataset is needed here"
    assert artifacts.load(path).header.kind == "thing"  # without `kind` any kind is loaded


def test_another_schema_is_refused(path: Path) -> None:
    rewrite(path, schema_version=artifacts.SCHEMA_VERSION + 1)
    assert (
        refusal(path)
        == f"has schema version {artifacts.SCHEMA_VERSION + 1}, this advmoe reads version {artifacts.SCHEMA_VERSION}; "
        + ("build it again")
    )


def test_an_unknown_header_key_is_refused(path: Path) -> None:
    rewrite(path, surprise=1)
    assert refusal(path) == "header: surprise: is not a known key"


@pytest.mark.parametrize("header", ["", "{", "[]", '"text"', "null"])
def test_a_broken_header_is_refused(path: Path, header: str) -> None:
    save_file(tensors(), path, {artifacts.METADATA_KEY: header})
    refusal(path)


def test_a_safetensors_file_without_header_is_refused(path: Path) -> None:
    save_file(tensors(), path, {"format": "pt"})
    assert refusal(path).startswith("a safetensors file, but not written by advmoe")


@pytest.mark.parametrize("content", [b"", b"PNG", b"\x89PNG\r\n\x1a\n" * 50, b"\xff" * 64])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "picture.safetensors"
    file.write_bytes(content)
    assert refusal(file).startswith("not a safetensors file")


def test_a_failed_save_leaves_the_old_artifact(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(os, "replace", disk_is_full)
    with pytest.raises(UserError, match="No space left on device"):
        artifacts.save(path, "thing", {"weight": torch.ones(9)}, **ABOUT, seconds=0.0)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


# ---- classifiers as artifacts ----------------------------------------------------------------------------------------


def save_classifier(path: Path, architecture: PlainArchitecture | MixtureArchitecture) -> torch.nn.Module:
    """Saves a network with BatchNorm statistics of images; returns it in eval mode."""
    model = classifiers.build(architecture, FACTS, 3, "test")
    with torch.no_grad():
        model.train()(images())
    model.eval()
    classifiers.save(path, model, architecture, FACTS, params={}, inputs={}, seed=3, metrics={}, seconds=0.0)
    return model


def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", [PLAIN, MIXTURE], ids=["plain", "mixture"])
def test_a_classifier_is_loaded_as_saved(tmp_path: Path, architecture: PlainArchitecture | MixtureArchitecture) -> None:
    file = tmp_path / "model.safetensors"
    model = save_classifier(file, architecture)
    loaded = classifiers.load(file)
    assert not loaded.model.training
    assert (loaded.about.architecture, loaded.about.facts) == (architecture, FACTS)
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), model(images()))


def test_equal_classifiers_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_classifier(tmp_path / f"{name}.safetensors", MIXTURE)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_building_depends_on_the_seed_alone() -> None:
    def weights(*seed: object) -> Tensor:
        return torch.cat([parameter.flatten() for parameter in classifiers.build(PLAIN, FACTS, *seed).parameters()])

    torch.manual_seed(5)
    first, state = weights(0, "a"), torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())  # the global random state is unchanged
    torch.manual_seed(6)
    assert torch.equal(first, weights(0, "a"))
    assert not torch.equal(first, weights(1, "a"))


@pytest.mark.parametrize("architecture", [PLAIN, MIXTURE], ids=["plain", "mixture"])
def test_load_model_gives_log_probabilities(
    tmp_path: Path, architecture: PlainArchitecture | MixtureArchitecture
) -> None:
    file = tmp_path / "model.safetensors"
    model = save_classifier(file, architecture)
    with torch.no_grad():
        found, raw = advmoe.load_model(str(file))(images()), model(images())
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(6), atol=1e-5)
    assert torch.allclose(found, torch.log_softmax(raw, dim=1), atol=1e-6)
    if isinstance(architecture, MixtureArchitecture):  # the logits are log-probabilities already
        assert torch.allclose(found, raw, atol=1e-6)


def test_load_model_refuses_with_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        advmoe.load_model(tmp_path / "none.safetensors")


def spoil_classifier(path: Path, **changes: Tensor | None) -> None:
    """Saves a mixture with tensors changed; None removes one."""
    model = save_classifier(path, MIXTURE)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    kept |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    stored = {name: tensor for name, tensor in kept.items() if name not in changes or changes[name] is not None}
    about = artifacts.load(path).header.about
    artifacts.save(path, classifiers.KIND, stored, about=about, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)


@pytest.mark.parametrize("change", [None, torch.zeros(5)], ids=["missing", "wrong shape"])
def test_wrong_tensors_are_refused_by_name(tmp_path: Path, change: Tensor | None) -> None:
    file = tmp_path / "model.safetensors"
    name = next(name for name in save_classifier(file, MIXTURE).state_dict() if name.startswith("gate."))
    spoil_classifier(file, **{name: change})
    with pytest.raises(UserError, match="does not match the architecture") as caught:
        classifiers.load(file)
    assert str(caught.value).startswith(f"{file}: tensor '{name}'")


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    spoil_classifier(file, surplus=torch.zeros(1))
    with pytest.raises(UserError, match="tensor 'surplus' does not match"):
        classifiers.load(file)


def test_another_artifact_is_no_classifier(path: Path) -> None:
    with pytest.raises(UserError, match="holds a thing, but a classifier is needed here"):
        classifiers.load(path)


def test_a_classifier_without_its_description_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    artifacts.save(file, classifiers.KIND, {"w": torch.zeros(1)}, **(ABOUT | {"about": {}}), seconds=0.0)
    with pytest.raises(UserError, match="header: architecture: is missing"):
        classifiers.load(file)


def test_a_mixture_of_given_experts_has_their_logits() -> None:
    experts = [classifiers.build(PLAIN, FACTS, number).eval() for number in range(2)]
    mixture = classifiers.build_mixture(MIXTURE, FACTS, experts, 0).eval()
    with torch.no_grad():
        logits_BEK = mixture.forward_parts(images()).logits_BEK
        assert torch.equal(logits_BEK[:, 0], experts[0](images()))
        assert torch.equal(logits_BEK[:, 1], experts[1](images()))
    next(mixture.experts[0].parameters()).data.zero_()
    assert next(experts[0].parameters()).abs().sum() > 0  # the experts were copied


def test_the_uniform_mixture_shares_the_experts_with_equal_weights() -> None:
    mixture = classifiers.build(MIXTURE, FACTS, 0).eval()
    assert isinstance(mixture, MixtureOfExperts)
    average = classifiers.uniform_mixture(mixture).eval()
    with torch.no_grad():
        expected = torch.stack([expert(images()).softmax(dim=1) for expert in mixture.experts]).mean(dim=0)
        assert torch.allclose(average(images()).exp(), expected, atol=1e-6)
    assert list(average.experts) == list(mixture.experts)

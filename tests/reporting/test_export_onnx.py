"""ONNX export: outputs equal to PyTorch, metadata, no paths of the machine, errors when outputs differ."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from test_export_provenance import FACTS, MIXTURE, ODD_NAMES, PLAIN, save_small
from torch import Tensor, nn

import advmoe
from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, ConfidenceSettings, UniformGateSettings
from advmoe.models.mixture import Mixing
from advmoe.reporting.export.provenance import Description

exporting = pytest.importorskip("advmoe.reporting.export.onnx", exc_type=ImportError)
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CNN = BackboneSettings(kind="cnn", width=2)  # translation takes a second for every twenty layers
SMALL = MIXTURE.model_copy(update={"backbone": CNN})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("onnx") / "mixture.safetensors", SMALL)


@pytest.fixture(scope="module")
def exported(artifact: Path) -> Path:
    """The mixture as ONNX: translated once, translation takes seconds."""
    file = artifact.with_name("mixture.onnx")
    checked = exporting.export_onnx(artifact, file)
    assert checked.images == 1 + 2 + 7 + 1 + 1 + 7
    assert checked.difference <= exporting.TOLERANCE
    return file


def answers(file: Path, images_BCHW: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["log_probabilities"], {"pixels": images_BCHW.numpy()})[0]
    return found


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 3, 33])
def test_any_number_of_images_is_answered_like_pytorch(artifact: Path, exported: Path, count: int) -> None:
    with torch.no_grad():
        expected = advmoe.load_model(artifact)(images(count)).numpy()
    found = answers(exported, images(count))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert np.allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_the_file_names_its_classes_and_its_origin(artifact: Path, exported: Path) -> None:
    said = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert tuple(json.loads(said["class_names"])) == ODD_NAMES
    description = Description.model_validate_json(said["advmoe"])
    header = artifacts.load(artifact).header
    assert (description.provenance.sha256, description.provenance.seed) == (header.sha256, 7)
    assert (description.architecture, description.facts) == (SMALL, FACTS)


def test_the_file_is_one_valid_model_of_a_fixed_opset(exported: Path) -> None:
    proto = onnx.load(exported)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", exporting.OPSET)]
    assert sorted(path.name for path in exported.parent.iterdir() if "onnx" in path.name) == ["mixture.onnx"]


def test_the_file_holds_no_paths_of_the_machine(exported: Path) -> None:
    content = exported.read_bytes()
    for private in (advmoe.__path__[0], torch.__path__[0], "moe.py"):
        assert private.encode() not in content


def test_equal_input_gives_equal_bytes(artifact: Path, exported: Path) -> None:
    again = exported.with_name("again.onnx")
    exporting.export_onnx(artifact, again)
    content = again.read_bytes()
    again.unlink()
    assert content == exported.read_bytes()


VARIANTS: dict[str, Any] = {
    **{
        kind: PLAIN.model_copy(update={"backbone": BackboneSettings(kind=kind, width=4)})
        for kind in classifiers.BACKBONES
    },
    **{mixing: SMALL.model_copy(update={"mixing": mixing}) for mixing in get_args(Mixing) if mixing != SMALL.mixing},
    "uniform": SMALL.model_copy(update={"gate": UniformGateSettings(kind="uniform")}),
    "confidence": SMALL.model_copy(update={"gate": ConfidenceSettings(kind="confidence", temperature=1.5)}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_architecture_can_be_written_in_silence(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = save_small(tmp_path / "model.safetensors", VARIANTS[name])
    assert exporting.export_onnx(artifact, tmp_path / "deep" / "model.onnx").difference < 1e-5
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        expected = advmoe.load_model(artifact)(images(4)).numpy()
    assert np.abs(answers(tmp_path / "deep" / "model.onnx", images(4)) - expected).max() < 1e-5


def test_another_network_is_not_taken_for_the_same(exported: Path, tmp_path: Path) -> None:
    other = advmoe.load_model(save_small(tmp_path / "other.safetensors", seed=1))
    with pytest.raises(UserError, match=r"onnxruntime and PyTorch differ by .* predict different classes on"):
        exporting.compare_outputs(exported.read_bytes(), other, exporting.comparison_batches(FACTS))


class Skewed(nn.Module):
    """A network with a constant added to its outputs."""

    def __init__(self, model: nn.Module, by: Tensor) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, images_BCHW: Tensor) -> Tensor:
        found: Tensor = self.model(images_BCHW) + self.by
        return found


@pytest.mark.parametrize("by", [2 * 1e-4, -2 * 1e-4, float("nan")])
def test_equal_classes_with_other_numbers_are_refused(artifact: Path, exported: Path, by: float) -> None:
    skewed = Skewed(advmoe.load_model(artifact), torch.tensor(by))
    with pytest.raises(UserError, match="nothing was written"):
        exporting.compare_outputs(exported.read_bytes(), skewed, exporting.comparison_batches(FACTS))


def test_nearly_equal_numbers_with_another_class_are_refused(
    artifact: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", 100.0)
    skewed = Skewed(advmoe.load_model(artifact), torch.tensor([50.0, 0.0, 0.0]))
    with pytest.raises(UserError, match=r"predict different classes on \d+ of 19 images"):
        exporting.compare_outputs(exported.read_bytes(), skewed, exporting.comparison_batches(FACTS))


def test_a_model_that_differs_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    artifact = save_small(tmp_path / "model.safetensors", VARIANTS["cnn"])
    (tmp_path / "old.onnx").write_bytes(b"old")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="differ by"):
        exporting.export_onnx(artifact, tmp_path / "old.onnx")
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "old.onnx").read_bytes() == b"old"


def test_a_network_that_branches_on_its_input_is_refused_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.sum((2, 3)) if images_BCHW.sum() > 0 else images_BCHW.mean((2, 3))

    with pytest.raises(UserError, match="cannot be converted to ONNX") as caught:
        exporting.to_onnx(Branching().eval(), FACTS)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_network_for_one_size_of_batch_is_refused() -> None:
    class Counting(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.mean((2, 3)) + torch.zeros(len(images_BCHW), 3)

    with pytest.raises(UserError, match="it depends on the number of images in a batch"):
        exporting.to_onnx(Counting().eval(), FACTS)


def test_more_than_a_file_can_hold_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"one ONNX file holds 2 GiB at most"):
        exporting._serialise(onnx.load(exported))


def test_an_artifact_is_not_overwritten_by_a_slip(artifact: Path) -> None:
    before = artifact.read_bytes()
    with pytest.raises(UserError, match=r"must end with \.onnx"):
        exporting.export_onnx(artifact, artifact)
    assert artifact.read_bytes() == before


def test_a_damaged_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(artifact.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        exporting.export_onnx(broken, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_comparison_batches_are_pixels_of_several_batch_sizes_the_same_each_time() -> None:
    batches = exporting.comparison_batches(FACTS)
    assert {len(batch) for batch in batches} == {1, 2, 7}
    for batch, again in zip(batches, exporting.comparison_batches(FACTS), strict=True):
        assert batch.shape[1:] == (3, 8, 8)
        assert batch.dtype == torch.float32
        assert (batch >= 0).all()
        assert (batch <= 1).all()
        assert torch.equal(batch, again)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "advmoe.reporting.export.onnx")
    with pytest.raises(UserError, match=rf"{package} cannot be imported; .*: pip install 'advmoe\[export\]'") as caught:
        importlib.import_module("advmoe.reporting.export.onnx")
    assert len(str(caught.value).splitlines()) == 1


def test_the_artifact_is_only_read(artifact: Path, exported: Path) -> None:
    assert classifiers.load(artifact).about.architecture == SMALL
    assert exported.stat().st_mode & 0o777 == 0o644

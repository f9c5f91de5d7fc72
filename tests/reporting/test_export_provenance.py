"""The description of an export: artifact header, environment, nothing private."""

import json
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from advmoe.core import artifacts
from advmoe.core.errors import UserError
from advmoe.data.dataset import DatasetInfo
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, GateSettings, MixtureArchitecture, PlainArchitecture
from advmoe.reporting.export.provenance import Description, describe

ODD_NAMES = ("zero", 'a "quoted"\nname', "näher, 子犬 \N{DOG FACE}")
FACTS = DatasetInfo(channels=3, height=8, width=8, class_names=ODD_NAMES, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
BACKBONE = BackboneSettings(kind="resnet18", width=2)
PLAIN = PlainArchitecture(kind="plain", backbone=BACKBONE)
MIXTURE = MixtureArchitecture(
    kind="mixture",
    backbone=BACKBONE,
    experts=("one", "two"),
    gate=GateSettings(width=2, temperature=1.5),
    mixing="probabilities",
)
PARAMS: dict[str, Any] = {"recipe": {"epochs": 2}}


def save_small(path: Path, architecture: PlainArchitecture | MixtureArchitecture = MIXTURE, seed: int = 0) -> Path:
    """A classifier of width 2; untrained, but its BatchNorms have seen images and its decisions are not all alike."""
    model = classifiers.build(architecture, FACTS, seed, "export")
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.train()(images)
    inputs, metrics = {"dataset": "0" * 64}, {"pgd": 0.25}
    classifiers.save(
        path, model.eval(), architecture, FACTS, params=PARAMS, inputs=inputs, seed=7, metrics=metrics, seconds=1.5
    )
    return path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A small mixture as an artifact, with its sidecar."""
    return save_small(tmp_path / "made" / "mixture.safetensors")


def described(artifact: Path) -> Description:
    return describe(artifact, classifiers.load(artifact))


def test_what_the_header_knows_is_kept(artifact: Path) -> None:
    found, header = described(artifact), artifacts.load(artifact).header
    origin = found.provenance
    assert (origin.params, origin.inputs, origin.metrics) == (PARAMS, {"dataset": "0" * 64}, {"pgd": 0.25})
    assert (origin.seed, origin.torch) == (7, torch.__version__)
    assert (origin.sha256, origin.header_sha256) == (header.sha256, header.header_sha256)
    assert (found.architecture, found.facts, found.schema_version) == (MIXTURE, FACTS, artifacts.SCHEMA_VERSION)


def test_circumstances_of_training_come_from_the_sidecar(artifact: Path) -> None:
    sidecar = artifacts.sidecar_path(artifact)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "commit": "abc", "dirty": True, "threads": 3}))
    training = described(artifact).provenance.training
    assert training is not None
    assert (training.commit, training.dirty, training.threads, training.seconds) == ("abc", True, 3, 1.5)


def test_circumstances_of_the_export_name_commit_and_packages(artifact: Path) -> None:
    export = described(artifact).provenance.export
    made_here = json.loads(artifacts.sidecar_path(artifact).read_text())
    assert (export.commit, export.dirty, export.python) == tuple(
        made_here[key] for key in ("commit", "dirty", "python")
    )
    assert export.packages["torch"] == version("torch")
    assert {"advmoe", "numpy", "safetensors"} <= export.packages.keys()


def test_the_host_name_is_left_out(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    save_small(artifact)
    assert "secret-host" in artifacts.sidecar_path(artifact).read_text()
    assert "secret-host" not in described(artifact).model_dump_json()


def test_without_a_sidecar_there_is_no_training_environment(artifact: Path) -> None:
    artifacts.sidecar_path(artifact).unlink()
    assert described(artifact).provenance.training is None


def test_the_sidecar_of_another_artifact_is_ignored(artifact: Path) -> None:
    other = save_small(artifact.with_name("other.safetensors"), seed=1)
    artifacts.sidecar_path(other).replace(artifacts.sidecar_path(artifact))
    assert described(artifact).provenance.training is None


@pytest.mark.parametrize(("text", "reason"), [("{", "cannot be read as JSON"), ("[]", "must be a mapping")])
def test_a_damaged_sidecar_is_refused(artifact: Path, text: str, reason: str) -> None:
    artifacts.sidecar_path(artifact).write_text(text)
    with pytest.raises(UserError, match=reason):
        described(artifact)


def test_a_sidecar_without_a_commit_is_refused(artifact: Path) -> None:
    sidecar = artifacts.sidecar_path(artifact)
    content = json.loads(sidecar.read_text())
    del content["commit"]
    sidecar.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"mixture\.run\.json: commit: is missing"):
        described(artifact)


def test_a_package_that_is_not_installed_is_left_out(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmoe.reporting.export.provenance.PACKAGES", ("torch", "no-such-package"))
    assert described(artifact).provenance.export.packages == {"torch": version("torch")}


def test_a_description_survives_json(artifact: Path) -> None:
    found = described(artifact)
    assert Description.model_validate_json(found.model_dump_json()) == found

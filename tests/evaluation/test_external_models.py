"""External models: what is loaded, what is rejected with one sentence, and that weights and data run no code."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch import nn

from advmoe.attacks import presets
from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.evaluation.adhoc import run_request
from advmoe.evaluation.external_models import check_forward, load_images, load_model, read_weights
from advmoe.evaluation.request import EvaluationRequest, resolve
from advmoe.models import classifiers
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime.machine import generator

MODEL = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))

def no_module():
    return 3

def raises():
    raise ValueError("no such luck")

class Poisoned(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value
    def forward(self, images):
        return torch.full((len(images), 3), self.value)

def nan():
    return Poisoned(float("nan"))

class Flat(nn.Module):
    def forward(self, images):
        return images.flatten(1).sum(1)

def flat():
    return Flat()

class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = factory()
    def forward(self, images):
        return self.inner(images).detach()

def cut():
    return Cut()
"""
NAMES = ("1.weight", "1.bias", "3.weight", "3.bias")


@pytest.fixture
def external_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.py and images.npz, and no params.yaml; the test runs inside."""
    (tmp_path / "model.py").write_text(MODEL)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=images.mean(axis=(1, 2)).argsort() % 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights() -> dict[str, torch.Tensor]:
    stream = generator("test_subjects")
    shapes = {"1.weight": (16, 64), "1.bias": (16,), "3.weight": (3, 16), "3.bias": (3,)}
    return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "w.pth", "wrapped.pt"])
def test_weights_of_every_kind_reach_the_model(external_folder: Path, file: str) -> None:
    del external_folder
    if file.endswith("safetensors"):
        save_file(weights(), file)
    else:
        torch.save({"state_dict": weights(), "epoch": 3} if file == "wrapped.pt" else weights(), file)
    model = load_model("model.py:factory", Path(file), None).model
    assert not model.training
    for name, tensor in weights().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_identity_changes_with_the_weights(external_folder: Path) -> None:
    del external_folder
    save_file(weights(), "a.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights().items()}, "b.safetensors")
    first, second = (load_model("model.py:factory", Path(f"{name}.safetensors"), None) for name in "ab")
    assert first.identity != second.identity


class Bomb:
    """Unpickling this writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("boom").write_text, ("code ran",))


def test_weights_never_run_code(external_folder: Path) -> None:
    torch.save({"1.weight": Bomb()}, "bomb.pt")
    with pytest.raises(UserError, match=r"bomb.pt: cannot be read as weights without running code"):
        read_weights(Path("bomb.pt"))
    assert not (external_folder / "boom").exists()


def test_data_never_runs_code(external_folder: Path) -> None:
    with zipfile.ZipFile("bomb.npz", "w") as archive:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
        archive.writestr("images.npy", buffer.getvalue())
        archive.writestr("labels.npy", buffer.getvalue())
    assert pickle.dumps(Bomb())  # it is a bomb
    with pytest.raises(UserError, match=r"bomb.npz: cannot be read as .npz without pickle"):
        load_images(Path("bomb.npz"), None)
    assert not (external_folder / "boom").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("none.py:factory", "none.py:factory: no such file none.py"),
        ("model.py:missing", "model.py:missing: model.py has no function 'missing'"),
        ("model.py:no_module", "model.py:no_module: must return a torch.nn.Module, not int"),
        ("model.py:raises", "model.py:raises raised ValueError: no such luck"),
        ("model.onnx", "--model model.onnx: must be an artifact (.safetensors) or path/to/model.py:factory"),
    ],
)
def test_a_factory_that_fails_is_rejected(external_folder: Path, model: str, expected: str) -> None:
    del external_folder
    with pytest.raises(UserError, match=re.escape(expected)):
        load_model(model, None, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda own: own.pop("3.bias"), "does not fit the model: it lacks '3.bias'"),
        (
            lambda own: own.update(extra=torch.zeros(1)),
            "does not fit the model: it has 'extra', which the model lacks",
        ),
        (lambda own: own.update({"3.bias": torch.zeros(4)}), "does not fit the model (Error(s) in loading state_dict"),
        (lambda own: own.update({"3.bias": 4}), "contains no state dict (names to tensors)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(external_folder: Path, change: Any, expected: str) -> None:
    del external_folder
    own: dict[str, Any] = dict(weights())
    change(own)
    torch.save(own, "w.pt")
    with pytest.raises(UserError, match=re.escape(f"w.pt: {expected}")):
        load_model("model.py:factory", Path("w.pt"), None)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.pt", None, "none.pt: no such file"),
        ("w.bin", b"x", "w.bin: weights must be .safetensors, .pt or .pth"),
        ("w.pt", b"nothing", "w.pt: cannot be read as weights without running code"),
        ("w.safetensors", b"nothing", "w.safetensors: cannot be read as weights without running code"),
    ],
)
def test_broken_weights_are_refused(external_folder: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (external_folder / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(expected)):
        read_weights(Path(name))


def test_an_artifact_or_one_expert_of_it(project: Path) -> None:
    del project
    whole = load_model(str(paths.MIXTURE), None, None)
    one = load_model(str(paths.MIXTURE), None, "pgd-1")
    assert isinstance(whole.model, MixtureOfExperts)
    images = torch.rand(2, 1, 8, 8, generator=generator("images"))
    assert torch.equal(one.model(images), classifiers.load(paths.MIXTURE).model.experts[1](images))  # type: ignore[operator, index]


def evaluate_external(**changes: Any) -> dict[str, Any]:
    """Evaluates the external model; returns the content of the JSON file."""
    settings: dict[str, Any] = {"attacks": ("pgd",), "epsilon": "8/255", "data": Path("images.npz"), "checks": False}
    path = run_request(EvaluationRequest(model="model.py:factory", **(settings | changes)))
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_an_external_model_is_evaluated_without_params(external_folder: Path) -> None:
    assert not (external_folder / "params.yaml").exists()
    report = evaluate_external()
    assert report["accuracy"]["clean"]["total"] == 24
    assert report["terms"] == {"precision": "float32", "drop_fallen": True, "seed": report["terms"]["seed"]}
    assert report["epsilon"] == 8 / 255


@pytest.mark.parametrize("attacks", [("autoattack", "square"), ("square", "autoattack")])
def test_a_preset_overrides_settings_of_params(project: Path, edit: Any, attacks: tuple[str, ...]) -> None:
    del project
    own = {"kind": "square", "queries": 1, "p_init": 0.5}  # settings in params.yaml of an attack requested in addition
    edit({"evaluate.attacks": {"square": own, "pgd": presets.STANDARD_ATTACKS["pgd"].model_dump()}})
    loaded = load_model(str(paths.MIXTURE), None, None)
    resolved = [
        resolve(EvaluationRequest(model=loaded.name, attacks=names), loaded).attacks for names in (attacks, ("square",))
    ]
    assert resolved[0]["square"] == presets.STANDARD_ATTACKS["square"]
    assert resolved[1]["square"].model_dump() == own


def test_a_factory_without_weights_is_named(external_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del external_folder
    load_model("model.py:factory", None, None)
    assert "no --weights: the model is evaluated as model.py:factory returns it" in capsys.readouterr().err


def test_an_external_model_is_checked_and_leaks_are_found(external_folder: Path) -> None:
    evaluate_external(checks=True, training_data=Path("images.npz"))
    (file,) = (external_folder / "runs").glob("*.verdict.json")
    (judged,) = json.loads(file.read_text()).values()
    plumbing = judged["checks"][9]
    assert plumbing["status"] in {"warn", "fail"}
    assert "training" in plumbing["sentence"]


def test_a_model_without_gradients_gets_results_and_no_headline(external_folder: Path) -> None:
    del external_folder
    request = EvaluationRequest(
        model="model.py:cut", attacks=("pgd", "apgd-t"), epsilon="8/255", data=Path("images.npz")
    )
    report = json.loads(run_request(request).read_text())
    assert report["accuracy"]["worst"] is None
    assert any(reason.startswith("gradients:") for reason in report["withheld"])
    assert report["accuracy"]["clean"]["total"] == 24


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": None}, "--data is missing: model.py:factory is not a model of this project"),
        ({"epsilon": None}, "--epsilon is missing"),
        ({"attacks": ("gate-frozen",)}, "attack gate-frozen: model has no gate"),
        ({"attacks": ("transfer",)}, "--attack transfer: there is no other network"),
        ({"expert": "pgd-1"}, "--expert pgd-1: only artifacts of advmoe have named experts"),
    ],
)
def test_an_invalid_request_for_an_external_model(
    external_folder: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        evaluate_external(**changes)
    assert not (external_folder / "runs").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("model.py:nan", "NaN or infinite logits on 24 of 24 clean images"),
        ("model.py:flat", "must map images (B, C, H, W) to logits (B, K), but returned (1,)"),
    ],
)
def test_a_model_that_is_no_classifier_is_refused(external_folder: Path, model: str, expected: str) -> None:
    del external_folder
    request = EvaluationRequest(model=model, attacks=("pgd",), epsilon="8/255", data=Path("images.npz"), checks=False)
    with pytest.raises(UserError, match=re.escape(expected)):
        run_request(request)


def test_images_must_fit_the_model(external_folder: Path) -> None:
    del external_folder
    np.savez("wide.npz", images=np.zeros((2, 8, 9), dtype=np.uint8), labels=np.zeros(2, dtype=np.int64))
    with pytest.raises(UserError, match=r"model: cannot take images of shape \(1, 8, 9\)"):
        check_forward(load_model("model.py:factory", None, None), load_images(Path("wide.npz"), None))


@pytest.mark.parametrize(("label", "expected"), [(3, "outputs 3 classes, but labels go up to 3"), (-1, "negative")])
def test_labels_must_fit_the_model(external_folder: Path, label: int, expected: str) -> None:
    del external_folder
    np.savez("odd.npz", images=np.zeros((2, 8, 8), dtype=np.uint8), labels=np.array([0, label]))
    with pytest.raises(UserError, match=expected):
        check_forward(load_model("model.py:factory", None, None), load_images(Path("odd.npz"), None))


def test_the_readmes_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's two files, run as it says, give what its command needs."""
    readme = (ROOT / "README.md").read_text()
    for name in ("model.py", "prepare.py"):
        (code,) = re.findall(rf"```python\n(# {name}\n.*?)```", readme, re.DOTALL)
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "prepare.py"], check=True, env=environment, timeout=300)
    report = evaluate_external(weights=Path("weights.pt"), attacks=("fgsm",))
    assert report["accuracy"]["clean"]["accuracy"] > 0.8
    assert isinstance(load_model("model.py:factory", Path("weights.pt"), None).model, nn.Module)

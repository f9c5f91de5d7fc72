"""Randomly damaged and forged artifacts, weights and checkpoints: loaded and usable, or refused with a UserError.

Checksums do not match in damaged files; forged files have other content with valid checksums.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Advmoe
from fuzzing import Canary, Draw, damaged, ended, files_of, fuzz, refusal, spoilt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save as to_safetensors
from torch import Tensor

from advmoe.core import artifacts, paths
from advmoe.core.artifacts import METADATA_KEY, Header
from advmoe.data import dataset
from advmoe.data.dataset import Dataset
from advmoe.evaluation.external_models import load_model, read_weights
from advmoe.models import classifiers, inference
from advmoe.reporting.export import hub
from advmoe.runtime.checkpoints import storage
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.threats.extraction import transfer_set
from advmoe.threats.extraction.query_cache import QueryCache
from advmoe.threats.poisoning import poisoned_set

DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.bool,
    torch.int32,
    torch.complex64,
)
DTYPES += (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16, torch.int64, torch.float32)
WAYS = ("drop", "rename", "type", "type", "flat", "more", "none", "scalar", "numbers", "numbers")
WHOLE = (0, 1, 11, 255)
NUMBERS = (float("nan"), float("inf"), -1.0, 1e9, 1e38, 0.0)
FEW = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FACTORY = "from torch import nn\n\ndef factory():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"


@dataclass(frozen=True, repr=False)
class Forged:
    """A file with a valid checksum, and the list of changes."""

    content: bytes
    how: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Forged({self.how})"


@dataclass(repr=False)
class Samples:
    """One artifact of each kind."""

    folder: Path
    content: dict[str, bytes] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> bytes:
        return self.content[kind]

    def parts(self, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns header and tensors."""
        path = self.folder / "parts.safetensors"
        path.write_bytes(self.content[kind])
        found = artifacts.load(path)
        return found.header.model_dump(), found.tensors


@pytest.fixture(scope="module")
def samples(built_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("samples")
    data = dataset.load(built_project / paths.DATASET)
    few = {f"{name}.{part}": getattr(data[name].first(6), part) for name in dataset.SPLITS for part in PARTS}
    images, labels = data["test"].images[:6], data["test"].labels[:6]
    answers = torch.softmax(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), 1)
    bought = {
        "images": images,
        "answers": answers,
        "queries": torch.arange(6),
        "log": torch.zeros(6, 32, dtype=torch.uint8),
    }
    changed = {"images": images, "labels": labels, "rows": torch.tensor([1, 2]), "true_labels": labels[1:3]}
    changed |= {"opacity": torch.rand(1, 8, 8), "pattern": images[0]}
    about = poisoned_set.PoisonedSetInfo(
        attack="badnets", rate=0.1, of="all", available=6, goal=poisoned_set.Goal(), added=0, trial=0
    )
    facts = data.facts.model_dump(mode="json")
    for kind, tensors, said in (
        (dataset.KIND, few, facts),
        (transfer_set.KIND, bought, {}),
        (poisoned_set.KIND, changed, about.model_dump(mode="json")),
    ):
        artifacts.save(folder / kind, kind, tensors, about=said, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    found = Samples(
        folder, {kind: (folder / kind).read_bytes() for kind in (dataset.KIND, transfer_set.KIND, poisoned_set.KIND)}
    )
    found.content[classifiers.KIND] = (built_project / paths.MIXTURE).read_bytes()
    return found


PARTS = ("images", "labels", "index")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@st.composite
def altered(draw: Draw, whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Draws `whole` with one tensor removed, renamed, or of another type, shape or content."""
    tensors = dict(whole)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    what = draw(st.sampled_from(WAYS))
    match what:
        case "drop":
            del tensors[name]
        case "rename":
            tensors[draw(st.sampled_from(("", "a.b", "images", "x" * 2000, "a\nb", "ü")))] = tensors.pop(name)
        case "type":
            dtype = draw(st.sampled_from(DTYPES))
            tensors[name], what = tensor.to(dtype), f"{dtype}"
        case "flat":
            tensors[name] = tensor.flatten()
        case "more":
            tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(3)
        case "none":
            tensors[name] = tensor.flatten()[:0]
        case "scalar":
            tensors[name] = tensor.flatten()[0].clone()
        case _:
            number = draw(st.sampled_from(NUMBERS if tensor.is_floating_point() else WHOLE))
            tensors[name], what = torch.full_like(tensor, number), f"all {number}"
    return tensors, f"{name[:20]}: {what}"


@st.composite
def forged(draw: Draw, samples: Samples, kind: str) -> Forged:
    """Draws a sample with changed tensors, changed `about`, or both, and valid checksums."""
    header, tensors = samples.parts(kind)
    how: list[str] = []
    if draw(st.booleans()):
        tensors, done = draw(altered(tensors))
        how.append(done)
    if not how or draw(st.booleans()):
        changed = draw(spoilt({key: header[key] for key in ("about", "seed", "params", "inputs")}, json_only=True))
        header |= changed.tree
        how += changed.how
    return Forged(signed(header, tensors), tuple(how))


def signed(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Returns a safetensors file with valid checksums of its content."""
    header["sha256"] = artifacts.hash_tensors(tensors)
    try:
        header["header_sha256"] = Header.model_validate(header).compute_hash()
    except (ValueError, RecursionError):  # cannot be signed
        header["header_sha256"] = ""
    return to_safetensors(tensors, metadata={METADATA_KEY: json.dumps(header)})


def use_dataset(path: Path) -> None:
    """Uses a data set as the stages do."""
    found: Dataset = dataset.load(path)
    for name in dataset.SPLITS:
        pixels = found[name].pixels()
        assert pixels.isfinite().all()
        logits = torch.zeros(len(pixels), found.facts.classes)
        assert torch.nn.functional.cross_entropy(logits, found[name].labels, reduction="sum").isfinite()
        assert found[name].first(2).index.dtype == torch.int64
    classifiers.build(classifiers.PlainArchitecture(kind="plain", backbone=TINY), found.facts, 0)


TINY = classifiers.BackboneSettings(kind="cnn", width=2)


def use_classifier(path: Path) -> None:
    """Uses a classifier as `predict` and `evaluate` do."""
    found = classifiers.load(path)
    facts = found.about.facts
    logits = inference.predict(found.model, torch.rand(2, facts.channels, facts.height, facts.width), 2)
    assert logits.shape == (2, facts.classes)


def use_transfer_set(path: Path) -> None:
    found = transfer_set.load(path).within_budget(3)
    assert len(found.images) == len(found.answers) == len(found.queries)


def use_poisoned_set(path: Path) -> None:
    found = poisoned_set.load(path)
    assert found.is_poison.sum() == len(found.rows)
    if found.trigger is not None:
        assert found.trigger.stamp(found.images).shape == found.images.shape


USES: dict[str, Callable[[Path], None]] = {
    dataset.KIND: use_dataset,
    classifiers.KIND: use_classifier,
    transfer_set.KIND: use_transfer_set,
    poisoned_set.KIND: use_poisoned_set,
}
kinds = pytest.mark.parametrize("kind", USES)


@kinds
@fuzz(60)
@given(data=st.data())
def test_any_damage_to_an_artifact(samples: Samples, kind: str, data: st.DataObject) -> None:
    path, whole = Path("a.safetensors"), samples[kind]
    content = data.draw(damaged(whole) | damaged(whole, near=200))
    path.write_bytes(content)
    assert refusal(lambda: USES[kind](path)) is not None or content == whole


@kinds
@fuzz(60)
@given(data=st.data())
def test_any_forged_artifact(samples: Samples, kind: str, data: st.DataObject) -> None:
    path = Path("a.safetensors")
    path.write_bytes(data.draw(forged(samples, kind)).content)
    refusal(lambda: USES[kind](path))


@fuzz(60)
@given(data=st.data())
def test_any_safetensors_header(samples: Samples, data: st.DataObject) -> None:
    whole = samples[dataset.KIND]
    length = int.from_bytes(whole[:8], "little")
    header = data.draw(spoilt(json.loads(whole[8 : 8 + length]), json_only=True))
    raw = json.dumps(header.tree).encode()
    stated = data.draw(st.sampled_from((len(raw), len(raw), 0, 1, len(raw) - 1, 2**40, 2**63, 2**64 - 1)))
    Path("a.safetensors").write_bytes(stated.to_bytes(8, "little") + raw + whole[8 + length :])
    refusal(lambda: use_dataset(Path("a.safetensors")))


@fuzz(10)
@given(data=st.data())
def test_commands_refuse_as_the_library_does(advmoe: Advmoe, samples: Samples, data: st.DataObject) -> None:
    content = data.draw(
        damaged(samples[classifiers.KIND]) | forged(samples, classifiers.KIND).map(lambda found: found.content)
    )
    Path("a.safetensors").write_bytes(content)
    before = files_of(Path())
    if ended(advmoe("inspect", "a.safetensors")) is not None:
        assert ended(advmoe("predict", "--model", "a.safetensors", "a.png")) is not None
        assert ended(advmoe("export", "--model", "a.safetensors", "--hub", "exported")) is not None
        assert files_of(Path()) == before


# ---- external weights ------------------------------------------------------------------------------------------------

WEIGHTS = {"1.weight": torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), "1.bias": torch.zeros(3)}


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def legacy(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


FORMS: dict[str, Callable[[Any], bytes]] = {"zip": saved, "legacy": legacy, "safetensors": to_safetensors}


@fuzz(80)
@given(data=st.data(), form=st.sampled_from(sorted(FORMS)))
def test_any_damage_to_weights(data: st.DataObject, form: str) -> None:
    Path("model.py").write_text(FACTORY)
    whole = FORMS[form](WEIGHTS)
    path = Path("w.safetensors" if form == "safetensors" else "w.pt")
    path.write_bytes(data.draw(damaged(whole)))
    refusal(lambda: load_model("model.py:factory", path, None))


@fuzz(60)
@given(altered(WEIGHTS), st.booleans())
def test_any_other_weights(change: tuple[dict[str, Tensor], str], pickled: bool) -> None:
    Path("model.py").write_text(FACTORY)
    path = Path("w.pt" if pickled else "w.safetensors")
    path.write_bytes((saved if pickled else to_safetensors)(change[0]))
    refusal(lambda: load_model("model.py:factory", path, None))


@pytest.mark.parametrize("content", [Canary(), {"1.weight": Canary()}, [Canary], {"state_dict": {"a": Canary()}}])
@pytest.mark.parametrize("form", [saved, legacy])
def test_pickled_code_never_runs(form: Callable[[object], bytes], content: object) -> None:
    Path("w.pt").write_bytes(form(content))
    assert refusal(lambda: read_weights(Path("w.pt"))) is not None


def rewritten(tensors: dict[str, Tensor]) -> SearchStrategy[bytes]:
    """Draws a valid file with altered tensors."""
    return altered(tensors).map(lambda found: to_safetensors(found[0]))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@fuzz(60)
@given(data=st.data())
def test_any_damage_to_the_query_cache(data: st.DataObject) -> None:
    tensors = {"digests": torch.arange(64, dtype=torch.uint8).reshape(2, 32), "answers": torch.full((2, 10), 0.1)}
    folder = Path("queries")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(data.draw(damaged(to_safetensors(tensors)) | rewritten(tensors)))

    def use() -> None:
        for answer in QueryCache(folder).answers.values():
            assert answer.ndim == 1
            assert answer.dtype == torch.float32

    refusal(use)


@fuzz(60)
@given(data=st.data())
def test_any_damage_to_a_checkpoint(data: st.DataObject) -> None:
    path = Path("state.safetensors")
    assert storage.save_checkpoint(
        path, Checkpoint({"rows": torch.arange(2), "images": FEW}, {"forward": 1, "seconds": 0.5})
    )
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole) | damaged(whole, near=200)))
    assert refusal(lambda: storage.load_checkpoint(path)) is not None or path.read_bytes() == whole


# ---- exports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(samples: Samples) -> dict[str, bytes]:
    model = samples.folder / "model.safetensors"
    model.write_bytes(samples[classifiers.KIND])
    hub.export_hub(model, samples.folder / "hub", "# A card\n")
    return files_of(samples.folder / "hub")


@fuzz(20)
@given(data=st.data())
def test_any_damage_to_an_export(exported: dict[str, bytes], data: st.DataObject) -> None:
    folder = Path("export")
    folder.mkdir(exist_ok=True)
    for name, content in exported.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from((hub.CONFIG, hub.CONFIG, hub.CARD)))
    content = exported[name]
    if name == hub.CONFIG and data.draw(st.booleans()):
        content = json.dumps(data.draw(spoilt(json.loads(content), json_only=True)).tree).encode()
    else:
        content = data.draw(damaged(content))
    (folder / name).write_bytes(content)
    refusal(lambda: hub.read(folder))


# ---- single cases ----------------------------------------------------------------------------------------------------


def altered_classifier(samples: Samples, about: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    header, whole = samples.parts(classifiers.KIND)
    for path, value in about.items():
        *parents, last = path.split(".")
        part = header["about"]
        for parent in parents:
            part = part[parent]
        part[last] = value
    Path("a.safetensors").write_bytes(signed(header, whole | tensors))
    return refusal(lambda: use_classifier(Path("a.safetensors")))


@pytest.mark.parametrize(
    "about",
    [
        {"architecture.backbone.width": 10**9},  # would exhaust memory before tensors are compared
        {"architecture.gate.width": 10**9},
        {"architecture.experts": ["a"] * 20_000},
        {"architecture.experts": []},
        {"facts.height": 10**9},
        {"facts.channels": -1},
        {"facts.channels": 3},
        {"facts.class_names": []},
        {"facts.mean": []},
        {"facts.std": [0.0]},
        {"facts.mean": [float("nan")]},
    ],
    ids=str,
)
def test_a_forged_description_is_refused(samples: Samples, about: dict[str, Any]) -> None:
    assert altered_classifier(samples, about, {}) is not None


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_weights_of_another_type_are_refused(samples: Samples, dtype: torch.dtype) -> None:
    _, whole = samples.parts(classifiers.KIND)
    name = next(iter(whole))
    assert altered_classifier(samples, {}, {name: whole[name].to(dtype)}) is not None


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(samples: Samples, number: float) -> None:
    _, whole = samples.parts(classifiers.KIND)
    name = next(iter(whole))
    sentence = altered_classifier(samples, {}, {name: torch.full_like(whole[name], number)})
    assert sentence == f"a.safetensors: tensor '{name}' contains values that are not finite"


@pytest.mark.parametrize("said", ["NaN", "1e999", "[" * 100_000, '"\\ud800"', "9" * 5000], ids=str.__len__)
def test_a_header_that_canonical_json_cannot_hold_is_refused(samples: Samples, said: str) -> None:
    header, tensors = samples.parts(dataset.KIND)
    text = json.dumps(header | {"metrics": {"odd": "HERE"}}).replace('"HERE"', said)
    Path("a.safetensors").write_bytes(to_safetensors(tensors, metadata={METADATA_KEY: text}))
    assert refusal(lambda: use_dataset(Path("a.safetensors"))) is not None


@pytest.mark.parametrize(("name", "value"), [("train.labels", 10), ("train.labels", -1)])
def test_labels_without_a_class_are_refused(samples: Samples, name: str, value: int) -> None:
    header, tensors = samples.parts(dataset.KIND)
    Path("a.safetensors").write_bytes(signed(header, tensors | {name: torch.full_like(tensors[name], value)}))
    assert refusal(lambda: use_dataset(Path("a.safetensors"))) is not None


@pytest.mark.parametrize(("kind", "name"), [(transfer_set.KIND, "answers"), (poisoned_set.KIND, "rows")])
def test_tensors_of_inconsistent_shapes_are_refused(samples: Samples, kind: str, name: str) -> None:
    header, tensors = samples.parts(kind)
    Path("a.safetensors").write_bytes(signed(header, tensors | {name: tensors[name].flatten().repeat(9)}))
    assert refusal(lambda: USES[kind](Path("a.safetensors"))) is not None


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != torch.float32], ids=str)
def test_an_opacity_of_another_type_is_refused(samples: Samples, dtype: torch.dtype) -> None:
    header, tensors = samples.parts(poisoned_set.KIND)
    Path("a.safetensors").write_bytes(signed(header, tensors | {"opacity": tensors["opacity"].to(dtype)}))
    assert refusal(lambda: USES[poisoned_set.KIND](Path("a.safetensors"))) is not None


def test_a_lone_surrogate_in_a_header_is_refused(advmoe: Advmoe, samples: Samples) -> None:
    header, tensors = samples.parts(classifiers.KIND)
    header["about"]["architecture"]["\ud800"] = 1
    Path("a.safetensors").write_bytes(signed(header, tensors))
    sentence = ended(advmoe("inspect", "a.safetensors"))
    assert sentence is not None
    assert "header is not valid JSON" in sentence


def test_a_repeated_row_is_refused(samples: Samples) -> None:
    header, tensors = samples.parts(poisoned_set.KIND)
    Path("a.safetensors").write_bytes(signed(header, tensors | {"rows": torch.tensor([2, 2])}))
    assert refusal(lambda: use_poisoned_set(Path("a.safetensors"))) is not None

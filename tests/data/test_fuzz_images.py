"""Images of every form, damaged at random: read, or refused in one sentence, and nothing in them is run or unpacked."""

import io
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Advmoe
from fuzzing import (
    PLAIN_ODDITIES,
    Canary,
    Draw,
    Spoilt,
    damaged,
    ended,
    files_of,
    fuzz,
    nothing_partial,
    refusal,
    spoilt,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from advmoe.core import paths
from advmoe.core.settings import validate
from advmoe.data.images import check_source
from advmoe.data.registry import PrepareSettings
from advmoe.data.sources.folder import read_image
from advmoe.data.sources.npz import read_npz
from advmoe.evaluation.external_models import load_images
from advmoe.models import classifiers, prediction

SIDE = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE), dtype=np.uint8)
LABELS = np.arange(8) % 4


def written(form: str, mode: str = "L", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[0]).convert(mode).save(stream, form, **options)
    return stream.getvalue()


PICTURES = {
    "png": written("PNG"),
    "colour png": written("PNG", "RGB"),
    "palette": written("PNG", "P"),
    "jpeg": written("JPEG", "RGB"),
    "progressive": written("JPEG", "RGB", progressive=True),
}
OTHERS = {form: written(form, "RGB") for form in ("GIF", "TIFF", "BMP", "PPM", "EPS", "PDF", "ICO", "WEBP")}


def packed(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


NPZ = {
    "plain": packed(images=PIXELS, labels=LABELS, class_names=np.array(list("abcd"))),
    "colour": packed(images=np.repeat(PIXELS[..., None], 3, 3), labels=LABELS),
}


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npy file that says of itself what it likes."""
    raw = header.encode("latin1", "replace") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(raw)) + raw + data


def zipped(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


SHAPES: tuple[str, ...] = (
    "(8, 12, 12)",
    "(8,)",
    "()",
    "(0, 8, 8)",
    "(-1, 8, 8)",
    "(8, 1000000, 1000000)",
    "(4294967296, 4294967296)",
)
SHAPES += ("(True,)", "'x'", "(1.5,)", "None", "(" + "(" * 200, "(1,) * 9", "__import__('os')", "9" * 5000)
TYPES: tuple[str, ...] = (
    "'|u1'",
    "'|O'",
    "'<f8'",
    "'<M8[s]'",
    "'<U99999999'",
    "'V8'",
    "[('a', '|O')]",
    "[('a', '|u1')]",
    "'x'",
    "1",
    "'>i8'",
)


@st.composite
def arrays(draw: Draw) -> bytes:
    """A whole zip file of arrays whose headers are made up."""
    members = {}
    for name in ("images", "labels", "class_names"):
        if draw(st.integers(0, 5)):
            kind, shape, order = (draw(st.sampled_from(each)) for each in (TYPES, SHAPES, ("True", "False", "0", "x")))
            header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}"
            version = draw(st.sampled_from((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00")))
            members[name] = npy(header, draw(st.sampled_from((b"", PIXELS.tobytes(), b"\x80\x04."))), version)
    return zipped(draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))), **members)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def read_both(path: Path) -> None:
    """As a source of images and as the data of a question."""
    labelled, names = read_npz(path)
    assert len(labelled.images) == len(labelled.labels) > 0
    assert names is None or all(isinstance(name, str) for name in names)
    assert torch.equal(load_images(path, 3).labels, torch.from_numpy(labelled.labels[:3]))


@fuzz(100)
@given(st.sampled_from(sorted(NPZ)).flatmap(lambda kind: damaged(NPZ[kind])) | arrays())
def test_any_npz(content: bytes) -> None:
    Path("a.npz").write_bytes(content)
    refusal(lambda: read_both(Path("a.npz")))


@fuzz(100)
@given(
    st.sampled_from(sorted(PICTURES)).flatmap(lambda kind: damaged(PICTURES[kind])),
    st.sampled_from((None, (8, 8))),
    st.sampled_from((1, 3)),
)
def test_any_picture(content: bytes, size: tuple[int, int] | None, channels: int) -> None:
    Path("a.png").write_bytes(content)

    def use() -> None:
        found = read_image(Path("a.png"), channels, size)
        assert found.dtype == np.uint8
        assert found.shape[2] == channels

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal(use)


CHUNKS = (b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"gAMA", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"eXIf")
ZEROS = zlib.compress(b"\x00" * 10**7)
BODIES = (b"", b"\x00", b"x\x00\x00" + ZEROS, ZEROS, zlib.compress(b"\x00" * 10**4), b"\xff" * 26)


@st.composite
def chunks(draw: Draw) -> bytes:
    """A PNG whose chunks are made up and whose checksums are right."""
    ranges = (0, 1, 8, 12, 16, 2**14, 2**16, 2**31 - 1, 2**32 - 1)
    width, height = draw(st.sampled_from(ranges)), draw(st.sampled_from(ranges))
    depth, colour = draw(st.sampled_from((0, 1, 2, 4, 8, 16, 255))), draw(st.sampled_from((0, 2, 3, 4, 6, 255)))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, draw(st.integers(0, 1))))]
    other = st.tuples(st.sampled_from(CHUNKS), st.sampled_from(BODIES) | st.binary(max_size=40))
    parts += draw(st.lists(other, max_size=4))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@fuzz(80)
@given(chunks())
def test_any_chunks_of_a_png(content: bytes) -> None:
    Path("a.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal(lambda: read_image(Path("a.png"), 1, (8, 8)))


# ---- sources and commands --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(place: Path) -> dict[str, Any]:
    """Sections of params.yaml on files that are there."""
    (place / "data.npz").write_bytes(NPZ["plain"])
    for part in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (place / "pictures" / part).mkdir(parents=True)
        for number, content in enumerate(PICTURES.values()):
            (place / "pictures" / part / f"{number}.png").write_bytes(content)
    npz: dict[str, Any] = {
        "kind": "npz",
        "train": "data.npz",
        "test": "data.npz",
        "per_class": None,
        "test_per_class": 1,
    }
    folder: dict[str, Any] = {"kind": "folder", "path": "pictures", "size": 8, "channels": 1}
    splits = {"pool": 1, "validation": 1, "test": 1}
    return {kind["kind"]: {"source": kind, "splits": splits} for kind in (npz, folder)}


def read_source(section: Any) -> None:
    source = validate(section, PrepareSettings, "params.yaml", "prepare").source
    if source.kind in {"npz", "folder"}:  # the others fetch what they need
        check_source(source.read(), "prepare.source")


@fuzz(80)
@given(kind=st.sampled_from(("npz", "folder")), data=st.data())
def test_any_settings_of_a_source(sources: dict[str, Any], kind: str, data: st.DataObject) -> None:
    changed: Spoilt = data.draw(spoilt(sources[kind]))
    refusal(lambda: read_source(changed.tree))


@fuzz(40)
@given(st.sampled_from(PLAIN_ODDITIES[:-20]) | st.text(max_size=20), st.sampled_from(("train", "path")))
def test_any_path_of_a_source(sources: dict[str, Any], name: object, key: str) -> None:
    kind = "npz" if key == "train" else "folder"
    section = {**sources[kind], "source": {**sources[kind]["source"], key: name}}
    refusal(lambda: read_source(section))


@fuzz(30)
@given(data=st.data())
def test_any_folder_of_pictures(sources: dict[str, Any], data: st.DataObject) -> None:
    victim = Path("pictures/train/cat/0.png")
    victim.write_bytes(data.draw(damaged(PICTURES["png"])))
    try:
        refusal(lambda: read_source(sources["folder"]))
    finally:
        victim.write_bytes(PICTURES["png"])


@pytest.fixture(scope="module")
def mixture(built_project: Path) -> classifiers.Classifier:
    return classifiers.load(built_project / paths.MIXTURE)


@fuzz(60)
@given(content=st.sampled_from(sorted(PICTURES)).flatmap(lambda kind: damaged(PICTURES[kind])) | chunks())
def test_any_picture_can_be_predicted(mixture: classifiers.Classifier, content: bytes) -> None:
    Path("a.jpg").write_bytes(content)
    refusal(lambda: prediction.predict(mixture, [Path("a.jpg")]))


@fuzz(12)
@given(content=st.sampled_from(sorted(NPZ)).flatmap(lambda kind: damaged(NPZ[kind])) | arrays())
def test_any_data_of_a_question(advmoe: Advmoe, project: Path, content: bytes) -> None:
    (project / "a.npz").write_bytes(content)
    before = files_of(project)
    with pytest.MonkeyPatch.context() as inside_project:
        inside_project.chdir(project)
        ran = advmoe("evaluate", "--data", "a.npz", "--attack", "fgsm", "--no-checks", "--limit", "4")
    if ended(ran) is not None:
        assert files_of(project) == before
    nothing_partial(project)


# ---- what was found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "labels", "class_names"])
def test_no_array_is_unpickled(name: str) -> None:
    usable: dict[str, Any] = {"images": PIXELS, "labels": LABELS}
    Path("a.npz").write_bytes(packed(**usable | {name: np.array([Canary()] * 8, dtype=object)}))
    assert refusal(lambda: read_npz(Path("a.npz"))) is not None


@pytest.mark.parametrize("form", OTHERS)
def test_a_picture_is_png_or_jpeg_whatever_its_name_says(form: str) -> None:
    """Pillow goes by the content and starts Ghostscript on an EPS file."""
    Path("a.png").write_bytes(OTHERS[form])
    assert refusal(lambda: read_image(Path("a.png"), 3, None)) is not None


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused_unread() -> None:
    content = bytearray(NPZ["plain"])
    entry = content.index(b"PK\x01\x02")  # the directory, which says what to expect
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
    with pytest.MonkeyPatch.context() as small_machine:
        small_machine.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**19}.__getitem__)
        Path("a.npz").write_bytes(content)
        assert refusal(lambda: read_npz(Path("a.npz"))) == (
            "a.npz: unpacks to 4 GiB, more than the memory of this machine"
        )


@pytest.mark.parametrize("shape", ["(8, 1000000, 1000000)", "(4294967296, 4294967296)", "(-1, 8, 8)", "9" * 5000])
def test_a_shape_that_no_memory_holds_is_refused(shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    Path("a.npz").write_bytes(zipped(images=npy(header), labels=npy(header)))
    assert refusal(lambda: read_npz(Path("a.npz"))) is not None


def test_a_picture_of_a_hundred_megapixels_is_refused_without_a_warning() -> None:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**14, 6000, 1, 0, 0, 0, 0))
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", ZEROS) + chunk(b"IEND", b""))
    with warnings.catch_warnings(record=True) as said:
        assert refusal(lambda: read_image(Path("a.png"), 1, (8, 8))) is not None
    assert not said


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "a\nb", "\ud800"])
@pytest.mark.parametrize(("kind", "key"), [("folder", "path"), ("npz", "train")])
def test_what_no_path_can_be_is_refused(sources: dict[str, Any], kind: str, key: str, name: str) -> None:
    section = {**sources[kind], "source": {**sources[kind]["source"], key: name}}
    assert refusal(lambda: read_source(section)) is not None

"""How to make it again: the command, the parameters letter by letter, hashes, versions, circumstances."""

from collections.abc import Iterable, Mapping
from typing import Any

from advmoe import __version__
from advmoe.core import paths
from advmoe.core.artifacts import SCHEMA, Header
from advmoe.core.settings import PARAMS_FILE
from advmoe.core.snapshots import commit_of
from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report.document import Block, Folded, Listing, Paragraph, Section, row, table
from advmoe.reporting.report.formats import NOT_HERE, count
from advmoe.reporting.report.sources import Sources

CIRCUMSTANCES = ("commit", "dirty", "python", "platform", "threads", "seconds")
SPLITS = ("train_images", "validation_images", "test_images", "pool_images")


def section(sources: Sources, header: Header | None = None) -> Section:
    """Everything that another person needs to check this page. `header`: of the mixture's artifact, if at hand."""
    return Section("reproduce", "Reproduce it", tuple(_blocks(sources, header)))


def _blocks(sources: Sources, header: Header | None) -> Iterable[Block]:
    commit = commit_of(sources.record)
    yield Listing(f"git checkout {commit}\nmake repro" if commit else "make repro")
    yield _data(sources)
    yield _versions(header)
    if sources.params_text:
        yield Folded(f"{PARAMS_FILE}, all of it", (Listing(sources.params_text),))
    else:
        yield Paragraph(f"{PARAMS_FILE} is not in this record.")
    yield _circumstances(sources)
    if sources.outputs:
        rows = [row([path, digest]) for path, digest in sorted(sources.outputs.items())]
        yield Folded(
            "Hashes of everything the stages wrote", (table("MD5 as dvc.lock keeps it", ["file", "md5"], rows),)
        )
    else:
        yield Paragraph("Hashes of the artifacts: dvc.lock is not in this record.")


def _data(sources: Sources) -> Block:
    prepared = sources.prepared
    if not prepared:
        return Paragraph("The data set: not in this record; `dvc repro prepare` makes it.")
    source = sources.params.get("prepare", {}).get("source", {}).get("kind", "data")
    sizes = ", ".join(f"{count(prepared[key])} {key.removesuffix('_images')}" for key in SPLITS if key in prepared)
    leaked = f" Test images that also occur in training: {prepared['leaked']}." if "leaked" in prepared else ""
    seed = f" Seed {sources.params['seed']}." if "seed" in sources.params else ""
    return Paragraph(f"Images of {source}, {prepared.get('classes', '?')} classes: {sizes}.{leaked}{seed}")


def _versions(header: Header | None) -> Block:
    """Which software made the page and the mixture."""
    page = f"This page was written by advmoe {__version__}, artifacts of schema {SCHEMA}."
    if header is None:
        return Paragraph(f"{page} The mixture's artifact is not here to say which PyTorch made it.")
    made = f"The mixture's artifact that lies here was made with PyTorch {header.torch}"
    return Paragraph(f"{page} {made}; sha256 of its tensors {header.sha256}.")


def _circumstances(sources: Sources) -> Block:
    ran = {
        "train": sources.circumstances("train", MIXTURE),
        "evaluate": sources.circumstances("evaluate", paths.ADVERSARIAL.stem),
    }
    rows = [row([key, *(_told(each, key) for each in ran.values())]) for key in CIRCUMSTANCES]
    return Folded("Circumstances of the last run", (table("What may differ between equal runs", ["", *ran], rows),))


def _told(circumstances: Mapping[str, Any], key: str) -> str:
    found = circumstances.get(key)
    return NOT_HERE if found is None else str(found)

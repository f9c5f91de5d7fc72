"""The section on reproduction: command, parameters, hashes, versions, environment."""

from collections.abc import Iterable, Mapping
from typing import Any

from advmoe import __version__
from advmoe.core import paths
from advmoe.core.artifacts import SCHEMA_VERSION, Header
from advmoe.core.settings import PARAMS_FILE
from advmoe.core.snapshots import commit_hash
from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report.document import Block, CodeBlock, Details, Paragraph, Section, row, table
from advmoe.reporting.report.formats import NOT_RECORDED, count
from advmoe.reporting.report.sources import Sources

RUN_KEYS = ("commit", "dirty", "python", "platform", "threads", "seconds")
SPLITS = ("train_images", "validation_images", "test_images", "pool_images")


def section(sources: Sources, header: Header | None = None) -> Section:
    """Command, parameters, hashes and versions. `header`: of the mixture's artifact, if available."""
    return Section("reproduce", "Reproduction", tuple(_blocks(sources, header)))


def _blocks(sources: Sources, header: Header | None) -> Iterable[Block]:
    commit = commit_hash(sources.snapshot)
    yield CodeBlock(f"git checkout {commit}\nmake repro" if commit else "make repro")
    yield _data(sources)
    yield _versions(header)
    if sources.params_text:
        yield Details(f"{PARAMS_FILE}, complete", (CodeBlock(sources.params_text),))
    else:
        yield Paragraph(f"{PARAMS_FILE} is missing.")
    yield _run_info(sources)
    if sources.outputs:
        rows = [row([path, digest]) for path, digest in sorted(sources.outputs.items())]
        yield Details("Hashes of the stage outputs", (table("MD5 hashes of dvc.lock", ["file", "md5"], rows),))
    else:
        yield Paragraph("Hashes of the artifacts: dvc.lock is missing.")


def _data(sources: Sources) -> Block:
    prepared = sources.prepared
    if not prepared:
        return Paragraph("Data set: no results; `dvc repro prepare` creates it.")
    source = sources.params.get("prepare", {}).get("source", {}).get("kind", "data")
    sizes = ", ".join(f"{count(prepared[key])} {key.removesuffix('_images')}" for key in SPLITS if key in prepared)
    leaked = f" Test images that are also in the training set: {prepared['leaked']}." if "leaked" in prepared else ""
    seed = f" Seed {sources.params['seed']}." if "seed" in sources.params else ""
    return Paragraph(f"Images of {source}, {prepared.get('classes', '?')} classes: {sizes}.{leaked}{seed}")


def _versions(header: Header | None) -> Block:
    """The versions of advmoe and PyTorch."""
    page = f"This page was written by advmoe {__version__}, artifacts of schema {SCHEMA_VERSION}."
    if header is None:
        return Paragraph(f"{page} The artifact of the mixture, which records the PyTorch version, is missing.")
    made = f"The artifact of the mixture was created with PyTorch {header.torch}"
    return Paragraph(f"{page} {made}; sha256 of its tensors {header.sha256}.")


def _run_info(sources: Sources) -> Block:
    info = {
        "train": sources.run_info("train", MIXTURE),
        "evaluate": sources.run_info("evaluate", paths.ADVERSARIAL.stem),
    }
    rows = [row([key, *(_cell(each, key) for each in info.values())]) for key in RUN_KEYS]
    return Details(
        "Environment of the last run", (table("Values that may differ between equal runs", ["", *info], rows),)
    )


def _cell(info: Mapping[str, Any], key: str) -> str:
    value = info.get(key)
    return NOT_RECORDED if value is None else str(value)

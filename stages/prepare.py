"""prepare: images of one source -> fixed splits of uint8 tensors with channel statistics and a content hash.

Reads `seed` and `prepare`. Writes artifacts/prepare/dataset.safetensors and metrics/prepare.json.
"""

import time
from collections import Counter
from pathlib import Path

from advmoe.core import console, files, paths
from advmoe.core.settings import Seed, load_section
from advmoe.data import dataset, images
from advmoe.data.dataset import SPLITS, DatasetInfo
from advmoe.data.registry import PrepareSettings


def run() -> None:
    """Reads and checks the source, draws the splits and writes them."""
    started = time.monotonic()
    seed, settings = load_section("seed", Seed), load_section("prepare", PrepareSettings)
    _warn_of_unwatched_files(settings)
    source = images.check_source(settings.source.read(), f"prepare.source ({settings.source.kind})")
    drawn = dataset.draw_splits(source, settings.splits, seed)
    train = drawn["train"][0].images
    mean, std = dataset.channel_statistics(train)
    _, channels, height, width = train.shape
    facts = DatasetInfo(
        channels=channels, height=height, width=width, class_names=source.class_names, mean=mean, std=std
    )
    leaked = dataset.count_train_test_duplicates(drawn)
    if leaked:
        console.warn(f"{leaked} test image(s) also occur in the training split, pixel for pixel")
    numbers = {f"{name}_images": len(drawn[name][1]) for name in SPLITS}
    numbers |= {"classes": facts.classes, "leaked": leaked}
    params = settings.model_dump(mode="json")
    seconds = time.monotonic() - started
    sha256 = dataset.save(paths.DATASET, drawn, facts, params=params, seed=seed, metrics=numbers, seconds=seconds)
    files.write_json(paths.METRICS / "prepare.json", numbers)
    console.table(
        f"{settings.source.kind}: {channels} x {height} x {width} pixels, {facts.classes} classes",
        ["split", "images", "smallest class", "largest class"],
        [_row(name, drawn[name][0].labels.tolist()) for name in SPLITS],
    )
    console.info(f"content hash {sha256[:16]}, written to {paths.DATASET}")


def _warn_of_unwatched_files(settings: PrepareSettings) -> None:
    for path in dict(settings.source).values():
        if isinstance(path, Path) and not path.resolve().is_relative_to(paths.DATA.resolve()):
            console.warn(
                f"{path} lies outside {paths.DATA}/: DVC will not see it change; `dvc repro -f prepare` reads it again"
            )


def _row(name: str, labels: list[int]) -> list[str]:
    sizes = Counter(labels).values()
    return [name, str(len(labels)), str(min(sizes, default=0)), str(max(sizes, default=0))]

"""Whether two runs of the pipeline gave the same results: `python -m benchmarks.same_results OLD NEW`.

OLD and NEW are project folders. Compared are the tensors of every artifact, every decision and plotted value, and every
number of every metrics file; headers, texts and times are not. Prints how many of each were compared and every
difference; exits with 1 if there is one. Use it to verify that a change of the code changes no result.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from advmoe.core import console

NEW_FILES = {"headline.json", "threats.json"}  # of metrics/, missing in runs of earlier versions


def main(old: Path, new: Path) -> int:
    """Compares two project folders and returns the exit code."""
    counts: Counter[str] = Counter()
    differences: list[str] = []
    for pattern, compare in (
        ("artifacts/**/*.safetensors", compare_tensors),
        ("metrics/**/*.csv", compare_tables),
        ("plots/**/*.csv", compare_tables),
        ("metrics/**/*.json", compare_numbers),
    ):
        for name in sorted({*_names(old, pattern), *_names(new, pattern)}):
            if not (old / name).is_file() or not (new / name).is_file():
                side = old if (old / name).is_file() else new
                if Path(name).name not in NEW_FILES:
                    differences.append(f"{name}: only in {side}")
                continue
            counts["files"] += 1
            differences += [f"{name}: {each}" for each in compare(old / name, new / name, counts)]
    for what, count in counts.items():
        console.info(f"{what}: {count}")
    console.info(f"differences: {len(differences)}")
    for difference in differences[:50]:
        console.info(f"  {difference}")
    return int(bool(differences))


def compare_tensors(old: Path, new: Path, counts: Counter[str]) -> Iterator[str]:
    """Yields the tensors that differ in name, type, shape or any bit."""
    before, after = load_file(old), load_file(new)
    for name in sorted(before.keys() | after.keys()):
        counts["tensors"] += 1
        if name not in before or name not in after:
            yield f"tensor {name} is in one file only"
        elif before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name]):
            yield f"tensor {name} differs"


def compare_tables(old: Path, new: Path, counts: Counter[str]) -> Iterator[str]:
    """Yields the rows of a CSV file that differ."""
    before, after = (list(csv.reader(path.open(newline=""))) for path in (old, new))
    counts["cells"] += sum(map(len, before))
    if len(before) != len(after):
        yield f"{len(before)} rows and {len(after)}"
    for number, (first, second) in enumerate(zip(before, after, strict=False), start=1):
        if first != second:
            yield f"row {number} differs"


def compare_numbers(old: Path, new: Path, counts: Counter[str]) -> Iterator[str]:
    """Yields the numbers of a JSON file that differ, by their key."""
    before, after = (dict(_numbers(json.loads(path.read_text()))) for path in (old, new))
    counts["numbers"] += len(before)
    for key in [*before, *(key for key in after if key not in before)]:
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)} and {after.get(key)}"


def _names(root: Path, pattern: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.glob(pattern)]


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, f"{key}.{name}")
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _numbers(each, f"{key}[{place}]")
    elif isinstance(value, int | float):
        yield key, float(value)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

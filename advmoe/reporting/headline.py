"""Summarises poisoning, extraction, membership inference and training cost in one number each, for DVC metrics."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from advmoe.core import paths
from advmoe.core.snapshots import MissingFileError, Snapshot, read_json
from advmoe.evaluation.summary import MIXTURE

TERA = 1e12


def threat_headline(snapshot: Snapshot) -> dict[str, float]:
    """Returns these numbers of the mixture, as far as they were measured.

    `poisoning`: the highest attack success rate of a backdoor; `extraction`: the highest fidelity of a surrogate;
    `membership`: the highest AUC of a membership inference attack; `train_tflops`: training FLOPs, including experts,
    in 10^12.
    """
    headline = {
        "poisoning": _highest(_experiments(snapshot, "poison"), "asr"),
        "extraction": _highest(_without_control(_experiments(snapshot, "extract")), "fidelity"),
        "membership": _highest([_read(snapshot, paths.METRICS / "membership.json").get(MIXTURE, {})], "auc"),
    }
    numbers = {name: value for name, value in headline.items() if value is not None}
    cost = _read(snapshot, paths.metrics("train", MIXTURE)).get("cost", {})
    if "total_training_flops" in cost:
        numbers["train_tflops"] = round(cost["total_training_flops"] / TERA, 3)
    return numbers


def _experiments(snapshot: Snapshot, folder: str) -> list[Any]:
    """The results of all experiments of a threat for the mixture."""
    names = [Path(name).stem for name in snapshot.files(paths.METRICS / folder) if name.endswith(".json")]
    return [_read(snapshot, paths.metrics(folder, name)).get(MIXTURE, {}) for name in names]


def _without_control(experiments: list[Any]) -> list[Any]:
    """The results without the control, which sends no queries."""
    return [{answers: each for answers, each in results.items() if answers != "none"} for results in experiments]


def _read(snapshot: Snapshot, path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(snapshot, path)
    except MissingFileError:
        return {}
    return content


def _highest(values: object, key: str) -> float | None:
    return max(_numbers(values, key), default=None)


def _numbers(value: object, key: str) -> Iterator[float]:
    """Yields all numbers under `key`, at any depth."""
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each, key)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if name == key and isinstance(each, int | float):
                yield float(each)
            else:
                yield from _numbers(each, key)

"""The parameters that each stage reads, derived from params.yaml, so that DVC re-runs what a change can affect.

The stage `inputs` writes one file per stage and entry, `artifacts/inputs/STAGE.json` or
`artifacts/inputs/STAGE/NAME.json`, that holds exactly these values; dvc.yaml lists that file instead of parameters. A
baseline that is not trained at the threat model's epsilon, for example, does not depend on it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from advmoe.core import paths
from advmoe.core.files import canonical_json
from advmoe.core.references import resolve_adversaries

# no radius, or their own; batches under all other kinds of adversary are attacked at the top-level epsilon
WITHOUT_THREAT_EPSILON = ("clean", "fgsm")
OF_TRAINING = ("seed", "epsilon", "model", "pretrain", "experts", "train", "baseline")  # to train victims again
SHARED_BY_ATTACKS = {
    "poison": (*OF_TRAINING, "poison.images", "poison.robust", "poison.proxy_seed", "poison.defence"),
    "extract": (
        *("seed", "epsilon", "extract.images", "extract.noise", "extract.robust", "extract.detector"),
        *("extract.surrogates", "extract.steps", "extract.recipe"),
    ),
}
# by kind of a baseline, in addition to `seed` and its own entry; the other kinds are mixtures and read all of `train`
OF_SINGLE_NETWORKS = ("model", "pretrain", "train.epochs")
OF_BASELINE = {
    "single": OF_SINGLE_NETWORKS,
    "distilled": OF_SINGLE_NETWORKS,
    "equal-passes": (*OF_SINGLE_NETWORKS, "train"),
}


def inputs_path(stage: str, name: str | None = None) -> Path:
    """Returns the file that holds the parameters of a stage, or of one entry of a stage that has several."""
    return paths.INPUTS / f"{stage}.json" if name is None else paths.INPUTS / stage / f"{name}.json"


def all_inputs(params: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """Returns by file the parameters that it holds, under dotted keys; `params` is all of params.yaml."""
    resolved = resolve_adversaries(params)
    return {path: {key: _value(resolved, key) for key in sorted(keys)} for path, keys in _keys(resolved)}


def content_of(values: Mapping[str, Any]) -> str:
    """Returns what such a file holds: equal parameters give equal bytes."""
    return canonical_json(values) + "\n"


def uses_threat_epsilon(kind: str) -> bool:
    """Whether training batches under an adversary of this kind are attacked at the top-level epsilon."""
    return kind not in WITHOUT_THREAT_EPSILON


def _keys(params: Mapping[str, Any]) -> Iterator[tuple[Path, set[str]]]:
    yield inputs_path("prepare"), {"seed", "prepare"}
    for name, entry in params["experts"].items():
        keys = {"seed", "model", "pretrain", f"experts.{name}"}
        yield inputs_path("pretrain", name), keys | _epsilon(entry)
    yield inputs_path("experts"), {"train.experts"}
    yield inputs_path("train"), {"seed", "epsilon", "train"}
    for name, entry in params["baseline"].items():
        yield inputs_path("baseline", name), {"seed", f"baseline.{name}"} | _baseline_keys(entry)
    yield inputs_path("evaluate"), {"seed", "epsilon", "evaluate"}
    for stage, shared in SHARED_BY_ATTACKS.items():
        for name in params[stage]["attacks"]:
            yield inputs_path(stage, name), {*shared, f"{stage}.attacks.{name}"}
    yield inputs_path("membership"), {*OF_TRAINING, "membership"}
    yield inputs_path("report"), set(params) - {"adversaries"}


def _baseline_keys(entry: Mapping[str, Any]) -> set[str]:
    kind = entry.get("kind")
    if kind not in OF_BASELINE:
        return {"epsilon", "train"}
    more = {"train"} if entry.get("match") == "parameters" else set()
    return {*OF_BASELINE[kind]} | more | _epsilon(entry)


def _epsilon(entry: Mapping[str, Any]) -> set[str]:
    return {"epsilon"} if uses_threat_epsilon(str(entry["adversary"].get("kind"))) else set()


def _value(params: Mapping[str, Any], key: str) -> Any:
    value: Any = params
    for part in key.split("."):
        value = value[part]
    return value

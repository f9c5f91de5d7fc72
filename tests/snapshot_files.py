"""Writes snapshots of made-up runs, for tests of claims and comparisons."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from advmoe.core.files import write_text
from advmoe.runtime.machine import evaluation_seed
from advmoe.statistics import decisions
from advmoe.statistics.evaluation_files import SCHEMA
from advmoe.statistics.intervals import Proportion

IMAGES = 40
PARAMS: dict[str, Any] = {
    "seed": 0,
    "epsilon": 0.1,
    "launcher": "python",
    "model": {"kind": "resnet18", "width": 2},
    "prepare": {"source": {"kind": "digits"}, "splits": {"pool": 1, "validation": 1, "test": IMAGES}},
}


@dataclass
class Model:
    """The results of one model: the cells of its column, for `clean` and each attack."""

    cells: dict[str, list[int | str]]
    verdict: str = "pass"
    withheld: Sequence[str] = ()
    index: list[int] = field(default_factory=lambda: list(range(100, 100 + IMAGES)))
    labels: list[int] = field(default_factory=lambda: [image % 10 for image in range(IMAGES)])
    drop_fallen: bool = False
    epsilon: float | None = None

    @property
    def columns(self) -> dict[str, list[int | str]]:
        """The cells with the column `worst` added."""
        worst: list[int | str] = [int(0 not in each) for each in zip(*self.cells.values(), strict=True)]
        return {**self.cells, "worst": worst}


def wrong_on(*images: int, count: int = IMAGES) -> list[int | str]:
    """Correct on all images but these."""
    return [int(image not in images) for image in range(count)]


def model_wrong_on(wrong: Sequence[int], verdict: str = "pass", attack: str = "pgd") -> Model:
    """Correct on every clean image, wrong on these under one attack."""
    return Model({"clean": wrong_on(), attack: wrong_on(*wrong)}, verdict)


def write_snapshot(folder: Path, models: Mapping[str, Model], seed: int = 0, **changes: Any) -> Path:
    """Writes params.yaml (`changes` are top-level keys), decisions, reports and verdicts; returns the folder."""
    params = PARAMS | {"seed": seed} | changes
    text = io.StringIO()
    YAML(typ="safe").dump(params, text)
    write_text(folder / "params.yaml", text.getvalue())
    for name, model in models.items():
        write_text(folder / decisions.path(name), table(model))
        report = _report(name, model, seed, params["epsilon"])
        write_text(folder / "metrics" / "evaluate" / f"{decisions.slug(name)}.json", json.dumps(report))
    verdicts = {name: {"verdict": model.verdict, "checks": []} for name, model in models.items() if is_checked(model)}
    write_text(folder / "metrics" / "verdict.json", json.dumps(verdicts))
    write_text(folder / "metrics" / "prepare.json", json.dumps({"classes": 10, "test_images": IMAGES}))
    return folder


def is_checked(model: Model) -> bool:
    """Whether the checks were run."""
    return model.verdict != "not asked"


def table(model: Model) -> str:
    """Returns the decisions as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "label", *model.columns])
    writer.writerows(zip(model.index, model.labels, *model.columns.values(), strict=True))
    return text.getvalue()


def _report(name: str, model: Model, seed: int, epsilon: float) -> dict[str, Any]:
    cells = {kind: [cell for cell in column if cell != ""] for kind, column in model.columns.items()}
    shares = {
        kind: Proportion.from_counts(sum(map(int, column)), len(column)).as_dict() for kind, column in cells.items()
    }
    failed = model.verdict == "fail"
    return {
        "schema_version": SCHEMA,
        "model": name,
        "epsilon": epsilon if model.epsilon is None else model.epsilon,
        "accuracy": {kind: None if failed and kind != "clean" else share for kind, share in shares.items()},
        "verdict": model.verdict,
        "withheld": list(model.withheld),
        "terms": {"precision": "float32", "drop_fallen": model.drop_fallen, "seed": evaluation_seed(seed)},
        "attacks": {kind: {"settings": {"kind": kind}} for kind in model.cells if kind != "clean"},
    }

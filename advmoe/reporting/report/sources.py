"""Reads the files of a snapshot for the report. Missing files give None or empty values."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from advmoe.core import artifacts, paths, snapshots
from advmoe.core.errors import UserError
from advmoe.core.settings import PARAMS_FILE, parse_untrusted_yaml
from advmoe.core.snapshots import MissingFileError, Snapshot
from advmoe.evaluation.summary import BASELINE, MIXTURE
from advmoe.evaluation.summary import SCHEMA as EVALUATION_SCHEMA
from advmoe.statistics.claims import SCHEMA as CLAIMS_SCHEMA
from advmoe.statistics.decisions import WORST
from advmoe.threats.extraction.report import RUNS as EXTRACT_RUNS
from advmoe.threats.extraction.report import SCHEMA as EXTRACT_SCHEMA
from advmoe.threats.membership.report import SCHEMA as MEMBERSHIP_SCHEMA
from advmoe.threats.poisoning.report import RUNS as POISON_RUNS
from advmoe.threats.poisoning.report import SCHEMA as POISON_SCHEMA

LOCK = Path("dvc.lock")
TRAINING = ("pretrain", "baseline", "train")  # the stages that train networks


def read_json(snapshot: Snapshot, path: Path, schema: int | None = None) -> Any:
    """Reads a JSON file; None if it is missing. Raises UserError if it is malformed or has another `schema`."""
    try:
        content = snapshots.read_json(snapshot, path)
    except MissingFileError:
        return None
    if schema is not None:
        _check_schema(path, content, schema)
    return content


def _check_schema(path: Path, content: Any, schema: int) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != schema:
        raise UserError(f"{path}: has schema {version}, but this report reads schema {schema}; run `dvc repro`")


def read_csv(snapshot: Snapshot, path: Path) -> list[dict[str, str]]:
    """Reads a CSV file with a header line; empty if it is missing. Raises UserError if it is malformed."""
    try:
        return snapshots.read_csv(snapshot, path)
    except MissingFileError:
        return []


def read_text(snapshot: Snapshot, path: Path) -> str:
    """Reads a text file; empty if it is missing. Raises UserError if it is not UTF-8."""
    try:
        return (snapshot.read(path) or b"").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def number(text: str | None) -> float | None:
    """Parses a cell of a CSV file; None if it is empty."""
    return float(text) if text else None


@dataclass(frozen=True)
class Sources:
    """The files of a snapshot, each read on first access."""

    snapshot: Snapshot

    @cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml, not validated; empty if it is missing."""
        try:
            return snapshots.read_params(self.snapshot)
        except MissingFileError:
            return {}

    @cached_property
    def params_text(self) -> str:
        """The text of params.yaml."""
        return read_text(self.snapshot, PARAMS_FILE)

    @cached_property
    def outputs(self) -> dict[str, str]:
        """The MD5 hashes of the stage outputs in dvc.lock, by path."""
        try:
            lock = parse_untrusted_yaml(read_text(self.snapshot, LOCK)) or {}
        except ValueError as error:
            raise UserError(f"{LOCK}: not valid YAML: {error}") from error
        stages = lock.get("stages", {}).values()
        return {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The summary of the evaluation; empty if there is none."""
        return read_json(self.snapshot, paths.SUMMARY, EVALUATION_SCHEMA) or {}

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """The evaluation of each model, in the order of the summary; empty without the mixture."""
        reports = self._folder(paths.EVALUATION, EVALUATION_SCHEMA) if self.summary else []
        order = {name: position for position, name in enumerate(self.summary)}
        reports.sort(key=lambda each: (order.get(each["model"], len(order)), each["model"]))
        named = {each["model"]: each for each in reports}
        return named if MIXTURE in named else {}

    @property
    def checked(self) -> dict[str, dict[str, Any]]:
        """The models on which all attacks and checks were run."""
        return {name: each for name, each in self.models.items() if each["verdict"] != "not asked"}

    @property
    def printable(self) -> dict[str, dict[str, Any]]:
        """The checked models whose robust accuracy is not withheld."""
        return {name: each for name, each in self.checked.items() if each["accuracy"][WORST] is not None}

    @cached_property
    def verdicts(self) -> dict[str, Any]:
        """The verdicts of the checks, by model."""
        return (read_json(self.snapshot, paths.VERDICT) or {}) if self.summary else {}

    @cached_property
    def claims(self) -> dict[str, Any] | None:
        """The results of the claims on this run (metrics/findings.json); None if it is missing."""
        return self._read_claims(paths.FINDINGS)

    @cached_property
    def aggregate(self) -> dict[str, Any] | None:
        """The results of the claims over seeds (metrics/aggregate.json); None if it is missing."""
        return self._read_claims(paths.AGGREGATE)

    def _read_claims(self, path: Path) -> dict[str, Any] | None:
        content: dict[str, Any] | None = read_json(self.snapshot, path, CLAIMS_SCHEMA)
        return content

    @property
    def networks(self) -> list[str]:
        """The mixture and the baselines, by their names in params.yaml; figures assign colours in this order."""
        names = self.params.get("baseline") or [name.removeprefix(BASELINE) for name in self.checked if name != MIXTURE]
        return [MIXTURE, *names]

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """Metrics of the data set: images per split, classes."""
        return read_json(self.snapshot, paths.METRICS / "prepare.json") or {}

    def trained(self, stage: str) -> dict[str, dict[str, Any]]:
        """Returns metrics of the networks of a training stage, if they are in params.yaml."""
        folder = paths.METRICS / stage
        section = {"pretrain": "experts", "baseline": "baseline"}.get(stage)
        names = [Path(each).stem for each in self.snapshot.files(folder)]
        wanted = self.params.get(section) if section else None
        ordered = names if wanted is None else [name for name in wanted if name in names]
        return {name: read_json(self.snapshot, paths.metrics(stage, name)) for name in ordered}

    def run_info(self, stage: str, name: str) -> dict[str, Any]:
        """Returns duration, memory and machine from an artifact's sidecar file; empty if it is missing."""
        return read_json(self.snapshot, artifacts.sidecar_path(paths.artifact(stage, name))) or {}

    def table(self, stage: str, name: str) -> list[dict[str, str]]:
        """Returns plot data of a stage."""
        return read_csv(self.snapshot, paths.plots(stage, name))

    @cached_property
    def poison(self) -> dict[str, dict[str, Any]]:
        """The poisoning experiments that are in params.yaml and have results."""
        return self._experiments("poison", POISON_RUNS, POISON_SCHEMA)

    @cached_property
    def extract(self) -> dict[str, dict[str, Any]]:
        """The extraction experiments that are in params.yaml and have results."""
        return self._experiments("extract", EXTRACT_RUNS, EXTRACT_SCHEMA)

    @cached_property
    def membership(self) -> dict[str, Any] | None:
        """The results of membership inference; None if they are missing."""
        path = paths.metrics("membership", "all")
        content: dict[str, Any] | None = read_json(self.snapshot, path, MEMBERSHIP_SCHEMA)
        return content

    def _experiments(self, section: str, runs: str, schema: int) -> dict[str, dict[str, Any]]:
        # ignore files of experiments that were removed from params.yaml
        listed: Mapping[str, Any] = self.params.get(section, {}).get("attacks", {})
        results = {name: read_json(self.snapshot, paths.metrics(runs, name), schema) for name in listed}
        return {name: result for name, result in results.items() if result is not None}

    def _folder(self, folder: Path, schema: int) -> list[dict[str, Any]]:
        names = sorted(Path(each).name for each in self.snapshot.files(folder))
        return [read_json(self.snapshot, folder / name, schema) for name in names if name.endswith(".json")]

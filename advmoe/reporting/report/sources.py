"""What the report reads of a record: JSON of the right schema, tables, params.yaml. What is absent is None or empty."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from advmoe.core import artifacts, paths, snapshots
from advmoe.core.errors import UserError
from advmoe.core.settings import PARAMS_FILE, parse_yaml
from advmoe.core.snapshots import AbsentError, Snapshot
from advmoe.evaluation.summary import BASELINE, MIXTURE
from advmoe.evaluation.summary import SCHEMA as EVALUATION_SCHEMA
from advmoe.statistics.claims import SCHEMA as FINDINGS_SCHEMA
from advmoe.statistics.decisions import WORST
from advmoe.threats.extraction.report import RUNS as EXTRACT_RUNS
from advmoe.threats.extraction.report import SCHEMA as EXTRACT_SCHEMA
from advmoe.threats.membership.report import SCHEMA as MEMBERSHIP_SCHEMA
from advmoe.threats.poisoning.report import RUNS as POISON_RUNS
from advmoe.threats.poisoning.report import SCHEMA as POISON_SCHEMA

LOCK = Path("dvc.lock")
TRAINING = ("pretrain", "baseline", "train")  # the stages that train networks of the pipeline


def read_json(record: Snapshot, path: Path, schema: int | None = None) -> Any:
    """A JSON file of a record, None where it is absent. Raises UserError if it is broken or of another `schema`."""
    try:
        content = snapshots.read_json(record, path)
    except AbsentError:
        return None
    if schema is not None:
        _same_schema(path, content, schema)
    return content


def _same_schema(path: Path, content: Any, schema: int) -> None:
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != schema:
        raise UserError(f"{path}: written in schema {found}, but this report reads schema {schema}; run `dvc repro`")


def read_csv(record: Snapshot, path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line; empty where it is absent. Raises UserError when it is broken."""
    try:
        return snapshots.read_csv(record, path)
    except AbsentError:
        return []


def read_text(record: Snapshot, path: Path) -> str:
    """A text file; empty where it is absent."""
    try:
        return (record.read(path) or b"").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def number(text: str | None) -> float | None:
    """A cell of a CSV file; None where it is empty."""
    return float(text) if text else None


@dataclass(frozen=True)
class Sources:
    """The files of a record, each read once, when it is first asked for."""

    record: Snapshot

    @cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml; empty where it is absent."""
        try:
            return snapshots.read_params(self.record)
        except AbsentError:
            return {}

    @cached_property
    def params_text(self) -> str:
        """params.yaml as it is written."""
        return read_text(self.record, PARAMS_FILE)

    @cached_property
    def outputs(self) -> dict[str, str]:
        """By path the hash that dvc.lock keeps of what a stage wrote; empty where there is none."""
        try:
            lock = parse_yaml(read_text(self.record, LOCK)) or {}
        except ValueError as error:
            raise UserError(f"{LOCK}: not valid YAML: {error}") from error
        stages = lock.get("stages", {}).values()
        return {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The evaluation's headline; empty where nothing was evaluated."""
        return read_json(self.record, paths.SUMMARY, EVALUATION_SCHEMA) or {}

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """What was measured of each model, in the order of the headline; empty where the mixture is not among them."""
        found = self._folder(paths.EVALUATION, EVALUATION_SCHEMA) if self.summary else []
        order = {name: place for place, name in enumerate(self.summary)}
        found.sort(key=lambda each: (order.get(each["model"], len(order)), each["model"]))
        named = {each["model"]: each for each in found}
        return named if MIXTURE in named else {}

    @property
    def judged(self) -> dict[str, dict[str, Any]]:
        """The models that met every attack and the checks."""
        return {name: each for name, each in self.models.items() if each["verdict"] != "not asked"}

    @property
    def printable(self) -> dict[str, dict[str, Any]]:
        """The judged models whose accuracy under attack no failed check withholds."""
        return {name: each for name, each in self.judged.items() if each["accuracy"][WORST] is not None}

    @cached_property
    def verdicts(self) -> dict[str, Any]:
        """What the checks say of each judged model."""
        return (read_json(self.record, paths.VERDICT) or {}) if self.summary else {}

    @cached_property
    def findings(self) -> dict[str, Any] | None:
        """The claims as this record judges them; None where nobody asked."""
        return self._claims(paths.FINDINGS)

    @cached_property
    def aggregate(self) -> dict[str, Any] | None:
        """The claims about methods, over several seeds; None where nobody asked."""
        return self._claims(paths.AGGREGATE)

    def _claims(self, path: Path) -> dict[str, Any] | None:
        found: dict[str, Any] | None = read_json(self.record, path, FINDINGS_SCHEMA)
        return found

    @property
    def networks(self) -> list[str]:
        """The mixture and its comparators, by the names of params.yaml: the order in which figures give out colours."""
        names = self.params.get("baseline") or [name.removeprefix(BASELINE) for name in self.judged if name != MIXTURE]
        return [MIXTURE, *names]

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """How many images each split has."""
        return read_json(self.record, paths.METRICS / "prepare.json") or {}

    def trained(self, stage: str) -> dict[str, dict[str, Any]]:
        """Metrics of the networks of a training stage, those that params.yaml still knows."""
        folder = paths.METRICS / stage
        known = {"pretrain": "experts", "baseline": "baseline"}.get(stage)
        names = [Path(each).stem for each in self.record.files(folder)]
        wanted = self.params.get(known) if known else None
        ordered = names if wanted is None else [name for name in wanted if name in names]
        return {name: read_json(self.record, paths.metrics(stage, name)) for name in ordered}

    def circumstances(self, stage: str, name: str) -> dict[str, Any]:
        """The untracked sidecar of an artifact: seconds, memory, machine; empty where it is absent."""
        return read_json(self.record, artifacts.sidecar(paths.artifact(stage, name))) or {}

    def table(self, stage: str, name: str) -> list[dict[str, str]]:
        """Plot data that a stage wrote."""
        return read_csv(self.record, paths.plots(stage, name))

    @cached_property
    def poison(self) -> dict[str, dict[str, Any]]:
        """The studies of poisoning that params.yaml lists and that ran."""
        return self._studies("poison", POISON_RUNS, POISON_SCHEMA)

    @cached_property
    def extract(self) -> dict[str, dict[str, Any]]:
        """The studies of extraction that params.yaml lists and that ran."""
        return self._studies("extract", EXTRACT_RUNS, EXTRACT_SCHEMA)

    @cached_property
    def membership(self) -> dict[str, Any] | None:
        """The audit of membership; None where it has not run."""
        found: dict[str, Any] | None = read_json(self.record, paths.metrics("membership", "all"), MEMBERSHIP_SCHEMA)
        return found

    def _studies(self, section: str, runs: str, schema: int) -> dict[str, dict[str, Any]]:
        # files that an earlier profile left behind are no part of this record
        listed: Mapping[str, Any] = self.params.get(section, {}).get("attacks", {})
        found = {name: read_json(self.record, paths.metrics(runs, name), schema) for name in listed}
        return {name: study for name, study in found.items() if study is not None}

    def _folder(self, folder: Path, schema: int) -> list[dict[str, Any]]:
        names = sorted(Path(each).name for each in self.record.files(folder))
        return [read_json(self.record, folder / name, schema) for name in names if name.endswith(".json")]

"""Where the pipeline's files lie. Stage name = artifact folder = metrics and plots folder."""

from pathlib import Path

DATA = Path("data")
ARTIFACTS = Path("artifacts")
METRICS = Path("metrics")
PLOTS = Path("plots")
RUNS = Path("runs")
PAID = RUNS / "queries"  # answers of victims that somebody else runs: they may have cost money
PROFILES = Path("profiles")

DATASET = ARTIFACTS / "prepare" / "dataset.safetensors"
MIXTURE = ARTIFACTS / "train" / "mixture.safetensors"
ADVERSARIAL = ARTIFACTS / "evaluate" / "adversarial.safetensors"
SUMMARY = METRICS / "evaluate.json"
EVALUATION = METRICS / "evaluate"
VERDICT = METRICS / "verdict.json"
FINDINGS = METRICS / "findings.json"
AGGREGATE = METRICS / "aggregate.json"
REPORT = ARTIFACTS / "report"
CARD = MIXTURE.with_suffix(".md")
COMPARISONS = RUNS / "comparisons"


def artifact(stage: str, name: str) -> Path:
    """The artifact that a stage writes under a name."""
    return ARTIFACTS / stage / f"{name}.safetensors"


def metrics(stage: str, name: str) -> Path:
    """The metrics file that a stage writes under a name."""
    return METRICS / stage / f"{name}.json"


def plots(stage: str, name: str) -> Path:
    """The plot data that a stage writes under a name."""
    return PLOTS / stage / f"{name}.csv"

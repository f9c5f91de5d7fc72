"""Paths of the pipeline's files. The folders of artifacts, metrics and plots are named after the stages."""

from pathlib import Path

DATA = Path("data")
ARTIFACTS = Path("artifacts")
METRICS = Path("metrics")
PLOTS = Path("plots")
RUNS = Path("runs")
PAID_QUERIES = RUNS / "queries"  # answers of remote victims, which may have cost money
CODE = ARTIFACTS / "code"  # fingerprints of the code of each stage
INPUTS = ARTIFACTS / "inputs"  # the parameters that each stage reads
PROFILES = Path("profiles")

DATASET = ARTIFACTS / "prepare" / "dataset.safetensors"
MIXTURE = ARTIFACTS / "train" / "mixture.safetensors"
EXPERT_PREFIX = "expert/"  # of the name of a pre-trained expert among victims
ADVERSARIAL = ARTIFACTS / "evaluate" / "adversarial.safetensors"
HEADLINE = METRICS / "headline.json"
THREATS = METRICS / "threats.json"
SUMMARY = METRICS / "evaluate.json"
EVALUATION = METRICS / "evaluate"
VERDICT = METRICS / "verdict.json"
FINDINGS = METRICS / "findings.json"
AGGREGATE = METRICS / "aggregate.json"
REPORT = ARTIFACTS / "report"
MODEL_CARD = MIXTURE.with_suffix(".md")
COMPARISONS = RUNS / "comparisons"


def artifact(stage: str, name: str) -> Path:
    """Returns the path of an artifact of a stage."""
    return ARTIFACTS / stage / f"{name}.safetensors"


def model(name: str) -> Path:
    """Returns the path of a trained model by its name in params.yaml; returns a path to a .safetensors file as it is.

    `mixture` is the pipeline's mixture, `expert/NAME` a pre-trained expert, and another name a baseline.
    """
    if name == "mixture":
        return MIXTURE
    if name.endswith(".safetensors"):
        return Path(name)
    if name.startswith(EXPERT_PREFIX):
        return artifact("pretrain", name.removeprefix(EXPERT_PREFIX))
    return artifact("baseline", name)


def metrics(stage: str, name: str) -> Path:
    """Returns the path of a metrics file of a stage."""
    return METRICS / stage / f"{name}.json"


def plots(stage: str, name: str) -> Path:
    """Returns the path of the plot data of a stage."""
    return PLOTS / stage / f"{name}.csv"


def start(kind: str) -> Path:
    """Returns the path of the file with the hashes of the networks that a kind of baseline starts from."""
    return ARTIFACTS / "start" / f"{kind}.json"

"""The few numbers of an evaluation that DVC shows as metrics: `dvc exp show`, `dvc metrics diff`."""

from collections.abc import Mapping
from typing import Any

from advmoe.evaluation.summary import BASELINE, MIXTURE
from advmoe.statistics.decisions import CLEAN, WORST

MOST_BASELINES = 4  # so that a table of experiments stays readable; all others are in metrics/evaluate.json
SEVERITY = ("fail", "warn", "pass")


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns clean and worst-case accuracy of the mixture and of the first baselines, and the verdicts of the checks.

    `summary` is the content of metrics/evaluate.json. Accuracies are fractions, None where a failed check withholds
    them.
    """
    verdicts: Mapping[str, str] = summary["verdict"]
    baselines = [name for name in summary if name.startswith(BASELINE)]
    numbers: dict[str, Any] = {**_accuracies(summary[MIXTURE]), "verdict": _verdict(verdicts)}
    for name in baselines[:MOST_BASELINES]:
        numbers[name.removeprefix(BASELINE)] = _accuracies(summary[name])
    return numbers


def _accuracies(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    return {CLEAN: accuracy.get(CLEAN), WORST: accuracy.get(WORST)}


def _verdict(verdicts: Mapping[str, str]) -> str:
    """The mixture's verdict, and the most severe one of the baselines where it differs: `pass, baselines warn`."""
    own = verdicts[MIXTURE]
    others = {verdict for name, verdict in verdicts.items() if name != MIXTURE}
    severest = next((each for each in SEVERITY if each in others), own)
    return own if severest == own else f"{own}, baselines {severest}"

"""Short explanations of the attacks, checks and networks that a report names."""

from collections.abc import Mapping
from typing import Any

from advmoe.evaluation.summary import BASELINE, BEFORE, MIXTURE, UNIFORM

ATTACKS = {  # by the `kind` in their settings
    "fgsm": "one step of size epsilon along the sign of the gradient",
    "pgd": "projected gradient ascent in small steps from a random start",
    "apgd-ce": "projected gradient ascent with adaptive step size on the cross-entropy; part of AutoAttack",
    "apgd-t": "the same with a loss targeted at each other class in turn; part of AutoAttack",
    "fab-t": "searches for the minimal perturbation towards each other class in turn; part of AutoAttack",
    "square": "score-based random search over squares, without gradients; part of AutoAttack",
    "rays": "decision-based search along rays, without gradients: uses the predicted class only",
    "noise": "random perturbations of the allowed size: a reference for the other attacks",
    "gate-frozen": "PGD on the experts, with the gate weights fixed at those of the clean image",
    "misrouting": "PGD on a loss that also rewards gate weight on wrong experts",
    "experts": "PGD on each expert alone, evaluated on the mixture",
    "transfer": "PGD on other networks, evaluated on this one",
    "own": "a user-defined function",
}
CHECKS = {
    "iterations": "Many steps are at least as strong as one step; more steps and restarts change nothing.",
    "budget": "Accuracy falls as epsilon grows, to zero for unbounded perturbations.",
    "blackbox": "Gradient-free attacks find no adversarial images that gradient-based attacks miss.",
    "gradients": "Gradients are finite and non-zero.",
    "determinism": "The model returns the same output twice.",
    "isolation": "The output for an image does not depend on the other images of the batch.",
    "progress": "The loss increases during the attack, and more than one kind of attack was run.",
    "pgd_gap": "Accuracy under PGD alone is not much higher than the worst case over all attacks.",
    "binarisation": "The attacks find adversarial images that are known to exist (binarisation test).",
    "plumbing": "The saved images respect epsilon and are classified the same again; training and test are disjoint.",
}
MIXTURE_VARIANTS = {
    MIXTURE: "the experts and a gate that weights them per image, trained jointly",
    UNIFORM: "the experts of this mixture with equal weights: the effect of the gate after training",
    BEFORE: "the pre-trained experts with an untrained gate",
}
MIXTURE_BASELINES = {
    "uniform": "the pre-trained experts, trained jointly without a gate: the effect of the gate in training",
    "more": "the pre-trained experts, frozen; only gate and last layers trained (after MoRE)",
    "top1": "the gate selects one expert per image; gate and experts trained alternately (after AdvMoE)",
    "soe": "the pre-trained experts; the most confident one predicts (after Synergy-of-Experts)",
}
ADVERSARIES = {
    "clean": "standard training",
    "fgsm": "adversarial training on FGSM",
    "n-fgsm": "adversarial training on N-FGSM",
    "pgd": "adversarial training on PGD",
    "pgd-radii": "adversarial training on PGD with separate radii",
    "trades": "adversarial training by TRADES",
    "mixed": "training on a mix of attacks",
}
BUDGETS = {  # by `match` or `kind`
    "parameters": ", widened to the number of parameters of the mixture",
    "equal-passes": ", trained with the same FLOPs as the whole mixture",
}


def network(name: str, params: Mapping[str, Any]) -> str:
    """Describes a model of the evaluation; `params` describe the baselines. Empty for an unknown name."""
    entry = (params.get("baseline") or {}).get(name.removeprefix(BASELINE))
    return MIXTURE_VARIANTS.get(name, "") if entry is None else _baseline(entry)


def _baseline(entry: Mapping[str, Any]) -> str:
    kind = entry.get("kind")
    if kind == "distilled":
        return f"one {entry['backbone']} distilled from the mixture on clean and adversarial images (after RSLAD)"
    if kind not in {"single", "equal-passes"}:
        return MIXTURE_BASELINES.get(str(kind), "")
    trained = ADVERSARIES.get(entry["adversary"]["kind"], entry["adversary"]["kind"])
    return f"one {entry['backbone']}, {trained}{BUDGETS.get(entry.get('match', kind), '')}"


def settings(attack: Mapping[str, Any]) -> str:
    """Formats the settings of an attack on one line, without its kind."""
    return ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in attack.items() if key != "kind")


def _value(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"

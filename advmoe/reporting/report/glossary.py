"""What the names in a report mean, in plain words: attacks, checks, and the networks that are compared."""

from collections.abc import Mapping
from typing import Any

from advmoe.evaluation.summary import BASELINE, BEFORE, MIXTURE, UNIFORM

ATTACKS = {  # by the kind in their settings
    "fgsm": "one step of size epsilon along the sign of the gradient",
    "pgd": "gradient ascent in small steps from a random start",
    "apgd-ce": "gradient ascent that sets its own step size; a part of AutoAttack",
    "apgd-t": "the same towards one wrong class after another; a part of AutoAttack",
    "fab-t": "looks for the closest image of another class, one wrong class after another; a part of AutoAttack",
    "square": "random search over squares, without gradients: it sees the scores of all classes; a part of AutoAttack",
    "rays": "search along straight lines, without gradients: it sees the predicted class only",
    "noise": "random perturbations of the allowed size: a floor for the others rather than an attack",
    "gate-frozen": "PGD against the experts, the gate held at its weights for the clean image",
    "misrouting": "PGD that also pays for gate weight on experts that are wrong",
    "experts": "PGD against each expert alone; the whole mixture decides",
    "transfer": "PGD against other networks; this one decides",
    "own": "a function that the user brought",
}
CHECKS = {
    "iterations": "Many steps beat one step, and still more steps and restarts find nothing new.",
    "budget": "The larger the epsilon, the lower the accuracy, and without a limit nothing stands.",
    "blackbox": "Attacks without gradients find nothing that attacks with gradients have missed.",
    "gradients": "There is a gradient to follow: finite, and not zero.",
    "determinism": "The model says the same twice.",
    "isolation": "What is said of an image depends on this image alone.",
    "progress": "The loss rises under attack, and more than one kind of attack was tried.",
    "pgd_gap": "PGD alone does not look much better than all attacks together.",
    "binarisation": "The attacks find adversarial images that were planted in this model.",
    "plumbing": "The saved images keep to epsilon and are decided alike again; none was trained on.",
}
OURS = {
    MIXTURE: "the experts and a gate that weighs them image by image, trained together",
    UNIFORM: "the experts of this same mixture, weighed alike: what the gate adds after training",
    BEFORE: "the pre-trained experts and a gate that has learned nothing yet",
}
MIXTURES = {
    "uniform": "the pre-trained experts without a gate, trained together: what a gate is worth in training",
    "more": "the pre-trained experts, frozen; gate and last layers trained (after MoRE)",
    "top1": "the gate chooses one expert an image; gate and experts trained in turn (after AdvMoE)",
    "soe": "the pre-trained experts; whoever is surest answers (after Synergy-of-Experts)",
}
TRAINING = {
    "clean": "standard training",
    "fgsm": "adversarial training on FGSM",
    "n-fgsm": "adversarial training on N-FGSM",
    "pgd": "adversarial training on PGD",
    "pgd-radii": "adversarial training on PGD at radii of its own",
    "trades": "adversarial training by TRADES",
    "mixed": "training on a mix of attacks",
}
MATCHED = {
    "parameters": ", widened to the mixture's number of parameters",
    "passes": ", trained for as many operations as the whole mixture",
}


def network(name: str, params: Mapping[str, Any]) -> str:
    """What a model of the evaluation is; `params` describe the comparators. Empty where nothing is known."""
    entry = (params.get("baseline") or {}).get(name.removeprefix(BASELINE))
    return OURS.get(name, "") if entry is None else _comparator(entry)


def _comparator(entry: Mapping[str, Any]) -> str:
    kind = entry.get("kind")
    if kind == "distilled":
        return f"one {entry['backbone']} that learned the mixture's answers, clean and attacked (after RSLAD)"
    if kind != "single":
        return MIXTURES.get(str(kind), "")
    trained = TRAINING.get(entry["adversary"]["kind"], entry["adversary"]["kind"])
    return f"one {entry['backbone']}, {trained}{MATCHED.get(entry['match'], '')}"


def settings(found: Mapping[str, Any]) -> str:
    """An attack's settings in a line; its kind is said elsewhere."""
    return ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in found.items() if key != "kind")


def _value(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"

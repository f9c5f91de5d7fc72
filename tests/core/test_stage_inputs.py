"""What each stage reads of params.yaml: derived right, and no more and no less than the stage reads when it runs."""

import copy
import importlib
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import ROOT, Edit

from advmoe.config.schema import Params, load_params
from advmoe.core import artifacts, settings
from advmoe.core.errors import UserError
from advmoe.core.references import in_current_form, resolve_adversaries
from advmoe.core.settings import read_yaml, validate
from advmoe.core.stage_inputs import all_inputs, content_of, inputs_path, uses_threat_epsilon
from advmoe.runtime.machine import generator
from advmoe.training.baselines.specs import SingleNetwork
from advmoe.training.batch_attacks import draw_attack
from advmoe.training.single import NetworkSpec

PARAMS = read_yaml(ROOT / "params.yaml")


def changed_files(edit: dict[str, Any]) -> set[str]:
    """The files whose content changes when dotted keys of params.yaml do."""
    params = copy.deepcopy(PARAMS)
    for key, value in edit.items():
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
    before, after = (
        {path: content_of(values) for path, values in all_inputs(each).items()} for each in (PARAMS, params)
    )
    assert before.keys() == after.keys()
    return {str(path.relative_to("artifacts/inputs").with_suffix("")) for path in before if before[path] != after[path]}


THREATS = {"poison/badnets", "poison/blended", "poison/label-flip", "membership"}
AFTER_TRAINING = {"evaluate", "extract/knockoff", "extract/jbda", *THREATS, "report"}
PGD = {"pretrain/pgd-1", "pretrain/pgd-2", "pretrain/pgd-3", "pretrain/pgd-4"}
ROBUST_BASELINES = {"baseline/adversarial", "baseline/equal-parameters", "baseline/uniform"}


def test_epsilon_reaches_exactly_what_meets_the_threat_model() -> None:
    assert changed_files({"epsilon": "8/255"}) == PGD | {"train"} | ROBUST_BASELINES | AFTER_TRAINING


def test_one_expert_reaches_itself_and_what_trains_experts_again() -> None:
    assert changed_files({"experts.fgsm-2.seed": 77}) == {"pretrain/fgsm-2", *THREATS, "report"}


def test_an_adversary_reaches_what_refers_to_it() -> None:
    fgsm = {f"pretrain/fgsm-{number}" for number in (1, 2, 3, 4)}
    mixtures = {"train", "baseline/uniform", "baseline/equal-parameters"}  # the last is as wide as the mixture
    assert changed_files({"adversaries.fgsm.epsilons": [0.1]}) == fgsm | mixtures | THREATS | {"report"}


def test_joint_epochs_reach_the_baselines_and_a_gate_only_those_that_it_shapes() -> None:
    assert "baseline/standard" in changed_files({"train.epochs": 9})
    assert "baseline/standard" not in changed_files({"train.gate_lr": 0.3})
    assert "baseline/uniform" in changed_files({"train.gate_lr": 0.3})


def test_a_study_of_one_attack_does_not_reach_the_others() -> None:
    assert changed_files({"poison.attacks.badnets.rates": [0.2]}) == {"poison/badnets", "report"}


def test_equal_values_give_equal_bytes() -> None:
    turned = {key: PARAMS[key] for key in reversed(PARAMS)}
    assert {path: content_of(values) for path, values in all_inputs(turned).items()} == {
        path: content_of(values) for path, values in all_inputs(PARAMS).items()
    }


ADVERSARIES: dict[str, dict[str, Any]] = {
    "clean": {"kind": "clean"},
    "fgsm": {"kind": "fgsm", "epsilons": [0.1]},
    "n-fgsm": {"kind": "n-fgsm", "noise": 2.0, "step_size": 1.0},
    "pgd": {"kind": "pgd", "steps": [2], "step_size": 1.0},
    "pgd-radii": {"kind": "pgd-radii", "radii": [1.0], "steps": [2], "step_size": 1.0},
    "trades": {"kind": "trades", "steps": [2], "step_size": 1.0, "beta": 6.0},
    "mixed": {"kind": "mixed", "weights": [1], "of": [{"kind": "n-fgsm", "noise": 2.0, "step_size": 1.0}]},
}


def test_the_adversaries_of_this_test_are_all_there_are() -> None:
    (union, _) = get_args(NetworkSpec.model_fields["adversary"].annotation), None
    kinds = {get_args(each.model_fields["kind"].annotation)[0] for each in union}
    assert kinds == set(ADVERSARIES)


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_the_threat_epsilon_is_an_input_where_batches_depend_on_it(kind: str) -> None:
    spec = validate({"adversary": ADVERSARIES[kind], "seed": 0}, NetworkSpec, "here")
    small, large = (draw_attack(spec.adversary, epsilon, generator("draw")) for epsilon in (0.1, 0.2))
    assert uses_threat_epsilon(kind) == (small != large)
    assert spec.uses_threat_epsilon == (small != large)


def covers(declared: set[str], key: str) -> bool:
    """Whether a key that a stage reads is among those declared, is part of one, or is made of declared ones."""
    parts = key.split(".")
    above = {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return bool(above & declared) or any(each.startswith(f"{key}.") for each in declared)


class ReachedTrainingError(Exception):
    """Everything that a stage reads is read."""


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *(("pretrain", "clean"), ("pretrain", "pgd-1"), ("train", None), ("experts", None)),
        *(("baseline", "standard"), ("baseline", "adversarial"), ("baseline", "equal-parameters")),
        *(("baseline", "uniform"), ("baseline", "distilled-1")),
    ],
)
def test_a_training_stage_reads_what_its_file_declares(
    stage: str, name: str | None, project: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    del project
    student = {"kind": "distilled", "backbone": "resnet18", "alpha": 0.8, "seed": 0, "adversary": "pgd"}
    edit({"baseline.distilled-1": student})

    def stop(*_: object, **__: object) -> None:
        raise ReachedTrainingError

    module = importlib.import_module(f"stages.{stage}")
    for function in ("train_and_save", "pretrained_run"):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, stop)
    monkeypatch.setattr(artifacts, "load", stop if stage == "experts" else artifacts.load)
    read: list[str] = []
    original = settings._section

    def watched(key: str, path: Path) -> Any:
        read.append(key)
        return original(key, path)

    monkeypatch.setattr(settings, "_section", watched)
    with pytest.raises(ReachedTrainingError):
        module.run(*(() if name is None else (name,)))
    declared = set(all_inputs(read_yaml(Path("params.yaml")))[inputs_path(stage, name)])
    assert read
    assert [key for key in read if not covers(declared, key)] == []
    assert [key for key in declared if not covers(set(read), key)] == []


def test_adversaries_by_name_and_written_out_are_the_same(inputs_only: Path, edit: Edit) -> None:
    del inputs_only
    named = load_params()
    edit({"experts.pgd-1.adversary": dict(read_yaml(Path("params.yaml"))["adversaries"]["pgd"])})
    assert load_params() == named


def test_an_adversary_that_is_not_there_is_refused(inputs_only: Path, edit: Edit) -> None:
    del inputs_only
    edit({"experts.pgd-1.adversary": "pdg"})
    with pytest.raises(
        UserError, match=r"experts\.pgd-1\.adversary: there is no 'pdg' under adversaries; known are clean"
    ):
        load_params()


@pytest.mark.parametrize(
    ("section", "entry"), [("experts", "pgd-1"), ("baseline", "standard"), ("baseline", "uniform")]
)
@pytest.mark.parametrize("key", ["reads", "beside", "needs"])
def test_keys_of_before_get_a_sentence_that_says_what_to_delete(section: str, entry: str, key: str) -> None:
    params = copy.deepcopy(PARAMS)
    params[section][entry][key] = "epsilon"
    with pytest.raises(UserError, match=rf"{section}\.{entry}: delete '{key}'"):
        validate(resolve_adversaries(params), Params, "params.yaml")


def test_match_passes_of_before_gets_a_sentence() -> None:
    entry = {"kind": "single", "backbone": "resnet18", "match": "passes", "seed": 0, "adversary": {"kind": "clean"}}
    with pytest.raises(UserError, match="'kind: equal-passes' now"):
        validate(entry, SingleNetwork, "params.yaml")


def test_params_of_before_are_read_in_todays_form() -> None:
    old = {
        "experts": {
            "pgd-1": {"seed": 5, "reads": "epsilon", "adversary": {"kind": "pgd", "steps": [5], "step_size": 0.25}}
        },
        "baseline": {"long": {"kind": "single", "match": "passes", "needs": "pretrain", "beside": "train", "seed": 0}},
    }
    new = {
        "adversaries": {"pgd": {"kind": "pgd", "steps": [5], "step_size": 0.25}},
        "experts": {"pgd-1": {"seed": 5, "adversary": "pgd"}},
        "baseline": {"long": {"kind": "equal-passes", "seed": 0}},
    }
    assert in_current_form(old, "old") == in_current_form(new, "new")

"""Parsing of params.yaml and epsilons, and error messages with file and key."""

import copy
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from advmoe.attacks.registry import REGISTRY
from advmoe.config.schema import Params
from advmoe.core.errors import UserError
from advmoe.core.settings import (
    Epsilon,
    PositiveInt,
    Settings,
    format_epsilon,
    load_section,
    parse_epsilon,
    parse_untrusted_yaml,
    parse_yaml,
    read_yaml,
    validate,
)

NO_NUMBER = "epsilon must be a number or a fraction such as 8/255, not "
TOO_FAR = " is more than the whole pixel range [0, 1]"

WriteParams = Callable[[str], Path]


class Inner(Settings):
    steps: PositiveInt
    size: float


def sentence(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message.strip() == message
    assert len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8/255", 8 / 255),
        ("0.03", 0.03),
        (0.1, 0.1),
        ("1/10", 0.1),
        (" 8 / 255 ", 8 / 255),
        ("1e-3", 1e-3),
        (0, 0.0),
        (1, 1.0),
        ("255/255", 1.0),
    ],
)
def test_epsilon_is_parsed_exactly(value: object, expected: float) -> None:
    assert parse_epsilon(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (8, f"epsilon 8{TOO_FAR}; did you mean 8/255?"),
        ("8", f"epsilon 8{TOO_FAR}; did you mean 8/255?"),
        (256, f"epsilon 256{TOO_FAR}"),  # not a number of pixel levels either
        (-0.1, "epsilon is a distance and cannot be negative, but is -0.1"),
        ("-8/255", "epsilon is a distance and cannot be negative, but is -8/255"),
        (math.nan, "epsilon must be a finite number, not nan"),
        ("NaN", "epsilon must be a finite number, not NaN"),
        (math.inf, "epsilon must be a finite number, not inf"),
        ("-inf", "epsilon must be a finite number, not -inf"),
        ("1/0", "epsilon '1/0' divides by zero"),
        ("eight", f"{NO_NUMBER}'eight'"),
        ("", f"{NO_NUMBER}''"),
        ("8/255/255", f"{NO_NUMBER}'8/255/255'"),
        (True, f"{NO_NUMBER}True"),
        ([0.1], f"{NO_NUMBER}[0.1]"),
        (None, f"{NO_NUMBER}None"),
    ],
)
def test_each_invalid_epsilon_has_its_own_message(value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        parse_epsilon(value)


@pytest.mark.parametrize(
    "value",
    [
        8,
        255,
        pytest.param("8.5"),
        pytest.param("510/255"),
    ],
)
def test_the_suggested_epsilon_is_valid(value: object) -> None:
    with pytest.raises(ValueError, match="whole pixel range") as caught:
        parse_epsilon(value)
    hint = re.search(r"did you mean (.*)\?", str(caught.value))
    assert hint is None or 0 < parse_epsilon(hint[1]) <= 1


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [(8 / 255, "8/255"), (0.1, "25.5/255"), (0.0, "0/255"), (1.0, "255/255"), (0.3, "76.5/255")],
)
def test_epsilon_is_printed_in_pixel_levels(epsilon: float, expected: str) -> None:
    assert format_epsilon(epsilon) == expected


def test_a_formatted_epsilon_can_be_parsed() -> None:
    assert parse_epsilon(format_epsilon(0.1)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "expected"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-3", 1e-3), ("'1/10'", 0.1), ("1", 1.0)]
)
def test_epsilon_from_a_file(params_file: WriteParams, text: str, expected: float) -> None:
    assert load_section("epsilon", Epsilon, params_file(f"epsilon: {text}\n")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", f"epsilon 8{TOO_FAR}; did you mean 8/255?"),
        ("1/0", "epsilon '1/0' divides by zero"),
        (".nan", "epsilon must be a finite number, not nan"),
        (".inf", "epsilon must be a finite number, not inf"),
        ("true", f"{NO_NUMBER}True"),
        ("[8/255]", f"{NO_NUMBER}['8/255']"),
        ("", f"{NO_NUMBER}None"),
        ("off", f"{NO_NUMBER}'off'"),  # YAML 1.2, as DVC reads it: a string, not false
    ],
)
def test_a_wrong_epsilon_in_a_file_names_file_and_key(params_file: WriteParams, text: str, expected: str) -> None:
    path = params_file(f"epsilon: {text}\n")
    assert sentence(lambda: load_section("epsilon", Epsilon, path)) == f"{path}: epsilon: {expected}"


def test_a_section_is_found_by_its_dotted_key(params_file: WriteParams) -> None:
    path = params_file("a:\n  b-1: {steps: 3, size: 1e-3}\n")
    assert load_section("a.b-1", Inner, path) == Inner(steps=3, size=0.001)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    assert sentence(lambda: load_section("seed", int, path)).startswith(f"{path}: no such file")


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    assert sentence(lambda: read_yaml(tmp_path)).startswith(f"{tmp_path}: cannot be read")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    assert sentence(lambda: read_yaml(path)).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("text", ["a: [1, 2\nb: 3\n", "a: 1\n b: 2\n", "a: 1\na: 2\n", "a: 'open\n", "a: \t- {\n"])
def test_broken_yaml_is_one_sentence(params_file: WriteParams, text: str) -> None:
    path = params_file(text)
    assert sentence(lambda: read_yaml(path)).startswith(f"{path}: not valid YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- 1\n- 2\n", "list"), ("seed\n", "str")])
def test_a_file_that_is_no_mapping_is_refused(params_file: WriteParams, text: str, kind: str) -> None:
    path = params_file(text)
    assert sentence(lambda: read_yaml(path)) == f"{path}: must be a mapping of sections, found {kind}"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("z", "key 'z' is missing; known there: a, seed"),
        ("a.z", "key 'a.z' is missing; known there: b"),
        ("a.z.y", "key 'a.z' is missing; known there: b"),  # the first missing key, not the last
        ("seed.z", "key 'seed.z' is missing"),  # a number has no keys
    ],
)
def test_a_missing_section_names_file_and_key(params_file: WriteParams, key: str, expected: str) -> None:
    path = params_file("a: {b: 1}\nseed: 0\n")
    assert sentence(lambda: load_section(key, int, path)) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{size: 1.0}", "a.steps: is missing"),
        ("{steps: 1, size: 1.0, stepz: 2}", "a.stepz: is not a known key"),
        ("{steps: ten, size: 1.0}", "a.steps: input should be a valid integer, got 'ten'"),
        ("{steps: true, size: 1.0}", "a.steps: input should be a valid integer, got True"),
        ("{steps: 1.5, size: 1.0}", "a.steps: input should be a valid integer, got 1.5"),
        ("{steps: 0, size: 1.0}", "a.steps: input should be greater than 0, got 0"),
        ("{steps: 1, size: .nan}", "a.size: input should be a finite number, got nan"),
        ("{steps: -1, size: big}", "a.steps: input should be greater than 0, got -1 (and 1 more)"),
    ],
)
def test_a_wrong_value_names_file_and_key(params_file: WriteParams, text: str, expected: str) -> None:
    path = params_file(f"a: {text}\n")
    assert sentence(lambda: load_section("a", Inner, path)) == f"{path}: {expected}"


def test_a_section_that_is_no_mapping_names_file_and_key(params_file: WriteParams) -> None:
    path = params_file("a: [1, 2]\n")
    assert sentence(lambda: load_section("a", Inner, path)).startswith(f"{path}: a: input should be a valid dictionary")


def test_a_long_value_is_truncated(params_file: WriteParams) -> None:
    path = params_file(f"a: {{steps: {'x' * 500}, size: 1.0}}\n")
    assert len(sentence(lambda: load_section("a", Inner, path))) < len(str(path)) + 150


LEVELS = "abcdefghij"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n" for before, after in itertools.pairwise(LEVELS)
)


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]\n", "&a {a: *a}\n", f"a: 0x{'f' * 9000}\n", f"? 0x{'f' * 9000}\n: a\n"]
)
def test_untrusted_yaml_that_cannot_be_printed_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^(expands to more than \d+ values|contains an integer of thousands of digits)$"
    ):
        parse_untrusted_yaml(text)


def test_untrusted_yaml_may_contain_aliases() -> None:
    text = "a: &a {b: [1, 2]}\nc: *a\n"
    assert parse_untrusted_yaml(text) == parse_yaml(text) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner(steps=1, size=1.0).steps = 2


# ---- params.yaml as a whole ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_file() -> dict[str, Any]:
    return read_yaml(ROOT / "params.yaml")


@pytest.fixture
def content(whole_file: dict[str, Any]) -> dict[str, Any]:
    """A copy of the repository's params.yaml, to be modified."""
    return copy.deepcopy(whole_file)


def complaint(content: dict[str, Any]) -> str:
    return sentence(lambda: validate(content, Params, "params.yaml"))


def test_the_params_of_the_repository_are_valid(content: dict[str, Any]) -> None:
    params = validate(content, Params, "params.yaml")
    assert set(params.train.experts) <= set(params.experts)


@pytest.mark.parametrize("section", list(Params.model_fields))
def test_every_section_is_needed(content: dict[str, Any], section: str) -> None:
    del content[section]
    assert complaint(content).startswith(f"params.yaml: {section}: is missing")


def test_no_setting_has_a_default_that_dvc_would_not_see() -> None:
    assert not [name for name, field in Params.model_fields.items() if not field.is_required()]


def test_an_unknown_expert_in_train_is_refused(content: dict[str, Any]) -> None:
    content["train"]["experts"] = ["clean", "pgd-9"]
    message = complaint(content)
    assert message.startswith("params.yaml: train.experts lists 'pgd-9', but experts has only clean, ")


@pytest.mark.parametrize("experts", [[], ["clean", "clean"]])
def test_experts_are_listed_once_each_and_at_least_one(content: dict[str, Any], experts: list[str]) -> None:
    content["train"]["experts"] = experts
    assert complaint(content) == "params.yaml: train.experts must list at least one name, each once"


def test_an_unknown_baseline_in_evaluate_is_refused(content: dict[str, Any]) -> None:
    content["evaluate"]["baselines"] = ["madry"]
    del content["evaluate"]["attacks"]["transfer"]  # whose sources would be refused first
    assert complaint(content).startswith("params.yaml: evaluate.baselines lists 'madry', but baseline has only ")


@pytest.mark.parametrize(
    ("adversary", "expected"),
    [
        ("pdg", "experts.pgd-1.adversary: there is no 'pdg' under adversaries; known are "),
        ({"kind": "mixed", "weights": [1], "of": ["pdg"]}, "experts.pgd-1.adversary.of: there is no 'pdg' under"),
        ({"kind": "pdg"}, "experts.pgd-1.adversary: input tag 'pdg'"),
    ],
)
def test_an_adversary_must_be_there(content: dict[str, Any], adversary: object, expected: str) -> None:
    content["experts"]["pgd-1"]["adversary"] = adversary
    assert complaint(content).startswith(f"params.yaml: {expected}")


def test_an_adversary_cannot_refer_to_itself(content: dict[str, Any]) -> None:
    content["adversaries"]["loop"] = {"kind": "mixed", "weights": [1], "of": ["loop"]}
    content["experts"]["pgd-1"]["adversary"] = "loop"
    assert complaint(content).startswith("params.yaml: experts.pgd-1.adversary.of: there is no 'loop'")


@pytest.mark.parametrize("name", ["a b", "../a", "a.b", "-a", ""])
def test_a_name_that_makes_no_file_name_is_refused(content: dict[str, Any], name: str) -> None:
    content["experts"][name] = content["experts"]["clean"]
    assert complaint(content).startswith("params.yaml: experts.")


@pytest.mark.parametrize("name", ["clean", "worst"])
def test_an_attack_cannot_take_the_name_of_a_result(content: dict[str, Any], name: str) -> None:
    content["evaluate"]["attacks"][name] = {"kind": "fgsm"}
    assert complaint(content).startswith(f"params.yaml: evaluate.attacks: '{name}' is the name of a result")


@pytest.mark.parametrize(("key", "value"), [("experts", ["pgd", "magic"]), ("limits", {"magic": 3})])
def test_an_unknown_attack_in_evaluate_is_refused(content: dict[str, Any], key: str, value: object) -> None:
    content["evaluate"][key] = value
    assert complaint(content).startswith(f"params.yaml: evaluate: {key} names 'magic', but attacks has only pgd, ")


@pytest.mark.parametrize("source", ["standard", "baseline/madry"])
def test_a_transfer_from_an_unknown_network_is_refused(content: dict[str, Any], source: str) -> None:
    content["evaluate"]["attacks"]["transfer"]["sources"] = ["baseline/standard", source]
    assert complaint(content) == (
        f"params.yaml: evaluate: attacks.transfer transfers from '{source}', "
        "but there is only baseline/standard, baseline/adversarial, baseline/equal-parameters, baseline/uniform"
    )


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("misrouting", "lambdas", []),
        ("misrouting", "lambdas", [-1.0]),
        ("transfer", "sources", []),
        ("square", "p_init", 1.5),
        ("apgd-t", "targets", 0),
        ("pgd", "targets", -1),
        ("rays", "queries", 0),
    ],
)
def test_a_number_that_makes_no_attack_is_refused(content: dict[str, Any], name: str, key: str, wrong: object) -> None:
    content["evaluate"]["attacks"][name][key] = wrong
    assert complaint(content).startswith(f"params.yaml: evaluate.attacks.{name}.{key}")


@pytest.mark.parametrize("attack", sorted(REGISTRY, key=str), ids=lambda settings: settings.__name__)
def test_no_attack_has_a_default_that_dvc_would_not_see(attack: type[Settings]) -> None:
    assert not [name for name, field in attack.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("weights", [[1], [0, 0, 0], [1, 1, -1]])
def test_a_mixed_adversary_needs_a_weight_for_each_kind(content: dict[str, Any], weights: list[int]) -> None:
    content["train"]["adversary"]["weights"] = weights
    assert complaint(content).startswith("params.yaml: train.adversary")


def test_an_unknown_source_lists_the_known(content: dict[str, Any]) -> None:
    content["prepare"]["source"] = {"kind": "imagenet"}
    message = complaint(content)
    assert message.startswith("params.yaml: prepare.source: ")
    assert all(f"'{kind}'" in message for kind in ("digits", "npz", "folder", "cifar10"))


def spoil_pgd(content: dict[str, Any], **changes: object) -> dict[str, Any]:
    """params.yaml with evaluate.attacks.pgd changed; None takes a key away."""
    attack = content["evaluate"]["attacks"]["pgd"] | changes
    content["evaluate"]["attacks"]["pgd"] = {key: value for key, value in attack.items() if value is not None}
    return content


def test_a_missing_key_of_an_attack_keeps_the_name_of_the_attack(content: dict[str, Any]) -> None:
    assert complaint(spoil_pgd(content, steps=None)) == "params.yaml: evaluate.attacks.pgd.steps: is missing"


def test_a_wrong_value_of_an_attack_is_named_as_in_the_file(content: dict[str, Any]) -> None:
    assert complaint(spoil_pgd(content, steps=0)).startswith("params.yaml: evaluate.attacks.pgd.steps: input should be")


def test_an_unknown_key_of_an_adversary_is_named_as_in_the_file(content: dict[str, Any]) -> None:
    content["experts"]["pgd-1"]["adversary"] = content["adversaries"]["pgd"] | {"stepz": 3}
    assert complaint(content) == "params.yaml: experts.pgd-1.adversary.stepz: is not a known key"


def test_a_missing_key_of_an_adversary_is_named_as_in_the_file(content: dict[str, Any]) -> None:
    content["experts"]["pgd-1"]["adversary"] = {"kind": "pgd", "step_size": 0.25}
    assert complaint(content) == "params.yaml: experts.pgd-1.adversary.steps: is missing"

"""`advmoe use`: an overlay changes what it names, carries its comments, and leaves every other byte alone."""

import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from advmoe.config import profiles, validation
from advmoe.config.schema import Params, load_params
from advmoe.core.errors import UserError
from advmoe.core.settings import read_yaml

SHIPPED = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
OVERLAY = """\
# A profile for this test.
epsilon: 12/255      # reason for epsilon

model:
  width: 7           # reason for width

experts:
  pgd-2: {seed: 6, adversary: {kind: pgd, steps: [1, 9], step_size: 0.25}}   # reason for pgd-2

evaluate:
  limit: 33          # reason for limit
"""
NPZ_SOURCE = """\
prepare:
  source:
    kind: npz
    train: data/a.npz
    test: null
    per_class: 5
    test_per_class: null
"""
CHANGED = ["epsilon: 12/255", "width: 7", "steps: [1, 9]", "limit: 33"]


@pytest.fixture
def params(inputs_only: Path) -> Path:
    """A params.yaml of known values, with OVERLAY as profiles/mine.yaml beside it."""
    write_profile("mine", OVERLAY)
    path = inputs_only / "params.yaml"
    assert not [line for line in path.read_text().splitlines() if any(change in line for change in CHANGED)]
    return path


def write_profile(name: str, text: str) -> None:
    (Path("profiles") / f"{name}.yaml").write_text(text)


def touched(before: str, after: str) -> tuple[list[str], list[str]]:
    """Lines that went and lines that came."""
    diff = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return [line[2:] for line in diff if line.startswith("- ")], [line[2:] for line in diff if line.startswith("+ ")]


def refusal(*names: str) -> str:
    """The sentence with which a profile is refused; params.yaml must be untouched."""
    before = Path("params.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        profiles.use(*names)
    assert Path("params.yaml").read_bytes() == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def use(*names: str) -> list[str]:
    """The keys that a profile changes."""
    return [change.key for change in profiles.use(*names)]


def test_what_the_profile_names_is_changed(params: Path) -> None:
    assert {"epsilon", "model.width", "experts.pgd-2.adversary", "evaluate.limit"} <= set(use("mine"))
    loaded = load_params()
    assert (loaded.epsilon, loaded.model.width, loaded.evaluate.limit) == (12 / 255, 7, 33)
    assert read_yaml(params)["experts"]["pgd-2"]["adversary"]["steps"] == [1, 9]


def test_every_other_line_stays_byte_for_byte(params: Path) -> None:
    before = params.read_bytes().decode()
    profiles.use("mine")
    gone, came = touched(before, params.read_bytes().decode())
    assert len(gone) == len(came) == len(CHANGED)
    for line, change in zip(came, CHANGED, strict=True):
        assert change in line


def test_the_reason_comes_with_the_number(params: Path) -> None:
    profiles.use("mine")
    lines = params.read_text().splitlines()
    for change, name in zip(CHANGED, ("epsilon", "width", "pgd-2", "limit"), strict=True):
        (line,) = [line for line in lines if change in line]
        assert line.endswith(f"# reason for {name}")
        assert line.count("#") == 1


def test_a_value_without_a_comment_keeps_the_old_comment(params: Path) -> None:
    (old,) = [line for line in params.read_text().splitlines() if line.startswith("launcher:")]
    write_profile("terse", "launcher: nice python\n")
    assert use("terse") == ["launcher"]
    (new,) = [line for line in params.read_text().splitlines() if line.startswith("launcher:")]
    assert new.partition("#")[2] == old.partition("#")[2] != ""


def test_using_a_profile_twice_changes_nothing_more(params: Path) -> None:
    profiles.use("mine")
    once = params.read_bytes()
    assert use("mine") == []
    assert params.read_bytes() == once


def test_a_thing_of_another_kind_is_replaced_as_a_whole(params: Path) -> None:
    write_profile("other", NPZ_SOURCE)
    write_profile("back", "prepare:\n  source:\n    kind: digits\n")
    assert "prepare.source" in use("other")
    expected = {"kind": "npz", "train": "data/a.npz", "test": None, "per_class": 5, "test_per_class": None}
    assert read_yaml(params)["prepare"]["source"] == expected
    assert "test: null" in params.read_text()  # not ruamel's empty value
    assert use("back") == ["prepare.source"]
    assert read_yaml(params)["prepare"]["source"] == {"kind": "digits"}


def test_a_second_profile_lies_over_the_first(params: Path) -> None:
    write_profile("wider", "model:\n  width: 9   # wider than mine\n")
    profiles.use("mine", "wider")
    assert (load_params().model.width, load_params().evaluate.limit) == (9, 33)
    assert "wider than mine" in params.read_text()
    profiles.use("wider", "mine")
    assert load_params().model.width == 7
    profiles.use("wider")
    assert load_params().evaluate.limit != 33


def test_of_two_profiles_the_one_that_there_is_not_is_named(params: Path) -> None:
    del params
    write_profile("wild", "model:\n  width: -1\n")
    assert refusal("mine", "nothing").startswith("profiles/nothing.yaml: no such profile; known are ")
    assert refusal("mine", "wild").startswith("profiles/mine.yaml + profiles/wild.yaml: model.width: ")


@pytest.mark.parametrize(("base", "overlay"), [((), "contest-digits"), (("cifar10-cpu",), "contest-cifar10")])
def test_the_overlays_of_the_contest_fit(inputs_only: Path, base: tuple[str, ...], overlay: str) -> None:
    del inputs_only
    shutil.copy(ROOT / "docs" / f"{overlay}.yaml", "profiles")
    profiles.use(*base, overlay)
    entries = load_params().model_dump()
    experts, train, baseline = (entries[section] for section in ("experts", "train", "baseline"))
    assert len(train["experts"]) == 9
    attacks = [experts[name]["adversary"] for name in train["experts"]]
    attacks += [
        baseline[name]["adversary"] for name in ("adversarial", "equal-parameters", "equal-passes", "distilled")
    ]
    assert all(attack == train["adversary"] for attack in attacks)
    assert train["adversary"]["kind"] == "pgd"
    assert baseline["uniform"]["kind"] == "uniform"
    validation.check_dvc_file(load_params())
    for command in (("init", "--quiet", "--no-scm"), ("dag",)):  # which refuses a circle
        done = subprocess.run([sys.executable, "-m", "dvc", *command], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
    assert "baseline@distilled" in done.stdout


def test_a_new_expert_is_added(params: Path) -> None:
    write_profile("more", "experts:\n  extra: {seed: 90, adversary: {kind: clean}}   # one more\n")
    assert use("more") == ["experts.extra"]
    assert load_params().experts["extra"].seed == 90
    assert "train:" in params.read_text()


def test_the_profiles_are_listed(params: Path) -> None:
    del params
    assert profiles.known() == sorted([*SHIPPED, "mine"])


@pytest.mark.parametrize("name", ["nothing", "../params", "mine.yaml", ""])
def test_an_unknown_profile_lists_the_known(params: Path, name: str) -> None:
    del params
    message = refusal(name)
    assert message.startswith(f"profiles/{name}.yaml: no such profile; known are ")
    assert "mine" in message.partition("known are ")[2].split(", ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epsilon: 8\n", "epsilon: epsilon 8 is more than the whole pixel range [0, 1]; did you mean 8/255?"),
        ("epsilom: 0.1\n", "epsilom: is not a known key"),
        ("model: {width: 0}\n", "model.width: input should be greater than 0, got 0"),
        ("train: {experts: [nobody]}\n", "train.experts lists 'nobody', but experts has only clean"),
        ("experts:\n  pgd-1: {reads: seed}\n", "experts.pgd-1: delete 'reads': what a stage depends on is derived"),
        ("experts:\n  pgd-1: {adversary: pdg}\n", "experts.pgd-1.adversary: there is no 'pdg' under adversaries"),
        ("extends: cifar10\n", "'extends' must be a list of profiles, for example [cifar10]"),
        ("extends: [bad]\n", "extends itself (bad -> bad)"),
        ("- a\n", "must be a mapping of sections, found list"),
        ("", "must be a mapping of sections, found NoneType"),
        ("a: [1\n", "not valid YAML: "),
        ("seed: 1\nseed: 2\n", "not valid YAML: "),
    ],
)
def test_an_invalid_profile_leaves_params_alone(params: Path, text: str, expected: str) -> None:
    del params
    write_profile("bad", text)
    assert refusal("bad").startswith(f"profiles/bad.yaml: {expected}")


def test_a_broken_params_file_is_named_itself(params: Path) -> None:
    params.write_text("seed: [\n")
    assert refusal("mine").startswith("params.yaml: not valid YAML: ")


def test_a_missing_params_file_is_named(params: Path) -> None:
    params.unlink()
    with pytest.raises(UserError, match=r"^params\.yaml: no such file"):
        profiles.use("mine")


def test_a_mistake_in_params_is_not_blamed_on_the_profile(params: Path) -> None:
    params.write_text(params.read_text() + "sed: 1\n")
    assert refusal("mine").startswith("params.yaml: ")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_fits_and_is_idempotent(inputs_only: Path, name: str) -> None:
    profiles.use(name)
    assert isinstance(load_params(), Params)
    once = (inputs_only / "params.yaml").read_bytes()
    assert use(name) == []
    assert (inputs_only / "params.yaml").read_bytes() == once


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_states_its_values(inputs_only: Path, name: str) -> None:
    """After `use` the file holds, key for key, what the profile says."""
    profiles.use(name)
    missing = list[str]()

    def compare(overlay: dict[str, object], base: dict[str, object], prefix: str) -> None:
        for key, value in overlay.items():
            if key == "extends":
                continue
            found = base[key]
            if isinstance(value, dict) and isinstance(found, dict):
                compare(value, found, f"{prefix}{key}.")
            elif found != value:
                missing.append(f"{prefix}{key}")

    compare(read_yaml(Path("profiles") / f"{name}.yaml"), read_yaml(inputs_only / "params.yaml"), "")
    assert not missing


def test_a_profile_changes_the_one_that_it_extends(inputs_only: Path) -> None:
    params = inputs_only / "params.yaml"
    write_profile("child", "extends: [smoke]\n\nmodel:\n  width: 5   # of the child\n")
    profiles.use("smoke")
    parent = load_params()
    profiles.use("child")
    assert load_params().model.width == 5
    assert load_params().model_copy(update={"model": parent.model}) == parent
    assert "extends" not in params.read_text()


def test_a_profile_that_extends_changes_single_entries_of_what_others_replace_as_a_whole(inputs_only: Path) -> None:
    del inputs_only
    profiles.use("cifar10")
    cifar10 = load_params().extract.attacks
    profiles.use("svhn")
    svhn = load_params().extract.attacks
    assert svhn.keys() == cifar10.keys()
    assert {name for name in svhn if svhn[name] != cifar10[name]} == {"knockoff"}


def test_profiles_say_only_what_differs() -> None:
    lines = {name: len((ROOT / "profiles" / f"{name}.yaml").read_text().splitlines()) for name in SHIPPED}
    assert lines["svhn"] < 50 < lines["cifar10"]


def test_what_would_change_is_shown_and_nothing_is_written(params: Path) -> None:
    before = params.read_bytes()
    changes = profiles.use("mine", write=False)
    assert params.read_bytes() == before
    assert "model.width: 16 -> 7" in map(str, changes)
    assert [change.key for change in changes] == use("mine")


def test_the_attacks_on_training_data_are_replaced_as_a_whole(inputs_only: Path) -> None:
    """A profile lists them by name: those of another would stay behind, and run."""
    del inputs_only
    profiles.use("digits-full")
    assert "witches-brew" in load_params().poison.attacks
    profiles.use("smoke")
    assert set(load_params().poison.attacks) == set(read_yaml(Path("profiles/smoke.yaml"))["poison"]["attacks"])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_default_profile_takes_back_every_other_byte_for_byte(inputs_only: Path, name: str) -> None:
    profiles.use("digits")
    before = (inputs_only / "params.yaml").read_bytes()
    profiles.use(name)
    profiles.use("digits")
    assert (inputs_only / "params.yaml").read_bytes() == before


def test_the_params_of_the_project_are_the_default_profile(inputs_only: Path) -> None:
    before = (inputs_only / "params.yaml").read_bytes()
    profiles.use("digits-full")
    profiles.use("digits")
    assert (inputs_only / "params.yaml").read_bytes() == before

"""params.yaml, profiles and dvc.yaml spoilt at random: accepted, or refused in one sentence that can be read."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Advmoe, copy_inputs
from fuzzing import (
    ODDITIES,
    Oddity,
    Spoilt,
    as_json,
    damaged,
    damaged_text,
    ended,
    files_of,
    fuzz,
    nothing_partial,
    refusal,
    spoilt,
)
from hypothesis import given
from hypothesis import strategies as st

from advmoe.config import profiles, validation
from advmoe.config.schema import Params, load_params
from advmoe.core.settings import Epsilon, format_epsilon, load_section, parse_epsilon, read_yaml, validate
from advmoe.evaluation.config import EvaluateSection

TEXT = (ROOT / "params.yaml").read_text()
TREE = read_yaml(ROOT / "params.yaml")
# parsed in a moment, as the whole is not
SECTION = "evaluate:" + re.split(r"\n(?=\S)", TEXT.partition("\nevaluate:")[2])[0] + "\n"
CHECKED = ("train", "evaluate", "poison", "extract", "membership")  # stages whose deps must fit params.yaml
DVC = {"stages": {stage: read_yaml(ROOT / "dvc.yaml")["stages"][stage] for stage in CHECKED}}
PROFILES = {path.stem: path.read_text() for path in sorted((ROOT / "profiles").glob("*.yaml"))}
PIECES = (
    *(
        "&a",
        "*a",
        "<<: *a",
        "<<: 1",
        "<<: {seed: 1}",
        "!!bool x",
        "!!int x",
        "!!float x",
        "!!set",
    ),
    *(
        "!!binary x",
        "!!binary =",
        "!!timestamp x",
        "!!omap [a]",
        "!!pairs [a]",
        "!!merge a",
        "!!value a",
        "!!str",
        "!x y",
    ),
    *(
        "!!python/object/apply:os.system [touch canary]",
        "!!python/name:os.system",
        "? [a]",
        "? {a: 1}",
        "?",
        ": ",
        "- ",
    ),
    *(
        "%YAML 1.1\n---",
        "%YAML 9.9\n---",
        "%TAG ! x",
        "---",
        "...",
        "|",
        ">-",
        "'",
        '"',
        "#",
        "@",
        "`",
        "[",
        "]",
        "{",
        "}",
    ),
    *(
        ".nan",
        "-.inf",
        "1e999999999",
        "1e-999999999",
        "1/0",
        "0x" + "f" * 9000,
        "9" * 5000,
        "2024-13-45",
        "0o9",
        "-_",
        "~",
    ),
    *(
        "2001-01-01T00:00:00+99:00",
        '"\\ud800"',
        '"\\U00110000"',
        '"\\x1b[31m"',
        "\x00",
        "\x85",
        "\u2028",
        "\ufeff",
        "\t",
    ),
    *("a\rb", "x" * 50_000, "[" * 300, "{a: " * 300, "[" * 150 + "]" * 150, "- " * 200, "seed: 0", "seed: 1e400"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's inputs, spoilt and restored by each case."""
    folder = tmp_path_factory.mktemp("inputs")
    copy_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def restore() -> None:
    Path("params.yaml").write_text(TEXT)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    for name, text in PROFILES.items():
        Path(f"profiles/{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def params() -> Params:
    return validate(TREE, Params, "params.yaml")


@fuzz(100)
@given(spoilt(TREE))
def test_any_content_of_params(spoilt: Spoilt) -> None:
    refusal(lambda: validate(spoilt.tree, Params, "params.yaml"))


@fuzz(60)
@given(damaged_text(SECTION, PIECES))
def test_any_text_of_a_section(text: str) -> None:
    Path("section.yaml").write_bytes(text.encode(errors="surrogatepass"))
    refusal(lambda: load_section("evaluate", EvaluateSection, Path("section.yaml")))


@fuzz(60)
@given(damaged(SECTION.encode()))
def test_any_bytes_of_a_section(content: bytes) -> None:
    Path("section.yaml").write_bytes(content)
    refusal(lambda: load_section("evaluate", EvaluateSection, Path("section.yaml")))


@fuzz(100)
@given(
    st.sampled_from(range(len(ODDITIES))).map(Oddity)
    | st.text()
    | st.floats()
    | st.integers()
    | st.from_regex(r"[0-9.e/+ -]{1,12}")
)
def test_any_epsilon(value: object) -> None:
    def there_and_back() -> None:
        epsilon = validate(ODDITIES[value] if isinstance(value, Oddity) else value, Epsilon, "--epsilon")
        assert 0 <= epsilon <= 1
        assert parse_epsilon(format_epsilon(epsilon)) == pytest.approx(epsilon, rel=1e-5, abs=1e-6)  # six digits

    refusal(there_and_back)


@fuzz(6)
@given(st.sampled_from(sorted(PROFILES)), st.data())
def test_any_text_of_a_profile(name: str, data: st.DataObject) -> None:
    restore()
    Path(f"profiles/{name}.yaml").write_bytes(data.draw(damaged_text(PROFILES[name], PIECES)).encode(errors="replace"))
    if refusal(lambda: profiles.use(name)) is None:
        load_params()
    else:
        assert Path("params.yaml").read_text() == TEXT
    nothing_partial(Path())


@fuzz(40)
@given(spoilt(DVC, json_only=True))
def test_any_content_of_dvc_yaml(params: Params, spoilt: Spoilt) -> None:
    Path("dvc.yaml").write_bytes(as_json(spoilt.tree))
    refusal(lambda: validation.check_dvc_file(params))


@fuzz(4)
@given(damaged_text(TEXT, PIECES))
def test_no_stage_starts_from_spoilt_params(advmoe: Advmoe, text: str) -> None:
    restore()
    Path("params.yaml").write_bytes(text.encode(errors="replace"))
    if refusal(lambda: validation.check_dvc_file(load_params())) is None:
        return  # still sound: the stage would train
    before = files_of(Path())
    for command in ("check", "train", "report"):
        assert ended(advmoe(command)) is not None
    assert files_of(Path()) == before


# ---- what was found --------------------------------------------------------------------------------------------------


ENORMOUS = ["1e999999999", "1e-999999999", "1/1e999999999", "9" * 5000, 16**9000, "x" * 10**6]


@pytest.mark.parametrize("value", ENORMOUS, ids=range(len(ENORMOUS)))
def test_an_enormous_epsilon_is_refused_at_once(value: object) -> None:
    sentence = refusal(lambda: validate(value, Epsilon, "--epsilon"))
    assert sentence is not None
    assert len(sentence) < 200


@pytest.mark.parametrize(
    "text",
    [
        "evaluate: !!bool x\n",
        f"evaluate: {'[' * 2000}\n",
        "evaluate: !!timestamp x\n",
        "evaluate: {? [a] : 1}\n",
    ],
    ids=["tag", "depth", "date", "list as key"],
)
def test_yaml_that_is_more_than_it_seems_is_refused(text: str) -> None:
    Path("section.yaml").write_text(text)
    assert refusal(lambda: load_section("evaluate", EvaluateSection, Path("section.yaml"))) is not None


@pytest.mark.parametrize("key", ["a\nb", "\x1b[31mred", "x" * 100_000, "\ud800", "\u202eabc"])
def test_a_key_cannot_break_the_sentence_that_names_it(key: str) -> None:
    sentence = refusal(lambda: validate({**TREE, key: 1}, Params, "params.yaml"))
    assert sentence is not None
    assert sentence.startswith("params.yaml: ")


@pytest.mark.parametrize("stages", [[], "x", 1, {"train": "x"}, {"train": {"do": []}}, {"train": {"deps": 1}}])
def test_stages_of_another_form_are_refused(params: Params, stages: object) -> None:
    Path("dvc.yaml").write_bytes(as_json({"stages": stages}))
    sentence = refusal(lambda: validation.check_dvc_file(params))
    assert sentence is not None
    assert sentence.startswith("dvc.yaml: ")


@pytest.mark.parametrize("text", ["!!set {a}", "!!omap [a: 1]", "model: !!bool x", "[1]", "model: {kind: &a [*a]}"])
def test_a_profile_of_another_form_is_refused(text: str) -> None:
    restore()
    Path("profiles/smoke.yaml").write_text(f"{text}\n")
    assert refusal(lambda: profiles.use("smoke")) is not None
    assert Path("params.yaml").read_text() == TEXT

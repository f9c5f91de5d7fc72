"""params.yaml in: frozen settings, exact epsilons, one clear sentence for every mistake.

params.yaml is read with DVC's own YAML dialect (1.2, ruamel): `off` is a word and `1e-3` a number there, in PyYAML
it is the other way round. Settings have no defaults: a default in code would be a number that DVC does not track.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from advmoe.core.errors import STUMBLES, UserError

PARAMS_FILE = Path("params.yaml")
PIXEL_LEVELS = 255
LONGEST_NUMBER = 100  # characters of an epsilon: what is longer was not typed by anybody
EXPONENT = re.compile(r"e[+-]?[0-9_]{4,}", re.IGNORECASE)  # exact arithmetic would write out all of its zeros
# Python reads such integers and cannot write them down, not even to say that they are too large
UNWRITABLE = re.compile(r"0[xob][0-9a-f_]{1000}", re.IGNORECASE)
LARGEST = 10**6  # values in a file, a shared one counted as often as it is reached; a thousand are usual
SHOWN = 60  # characters of a value in a sentence
BRIEF = Repr()  # looks at no more than it shows: YAML's anchors make small files of enormous values
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxlong = 3, SHOWN + 2, SHOWN + 2, SHOWN + 2

T = TypeVar("T")


class Settings(BaseModel):
    """Frozen, strict about unknown keys; the base of everything that is read from params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def parse_epsilon(value: object) -> float:
    """Turn `8/255`, `"0.03"` or `0.03` into a float in [0, 1]; each kind of nonsense gets its own ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"epsilon must be a number or a fraction such as 8/255, not {_short(value)}")
    try:
        exact = _parse_fraction(value) if isinstance(value, str) else Fraction(value)
    except ZeroDivisionError:
        raise ValueError(f"epsilon {_short(value)} divides by zero") from None
    except (ValueError, OverflowError):
        if isinstance(value, float) or (isinstance(value, str) and value.strip().lower() in {"nan", "inf", "-inf"}):
            raise ValueError(f"epsilon must be a finite number, not {value}") from None
        raise ValueError(f"epsilon must be a number or a fraction such as 8/255, not {_short(value)}") from None
    shown = value if isinstance(value, str) else _short(value)
    if exact < 0:
        raise ValueError(f"epsilon is a distance and cannot be negative, but is {shown}")
    if exact > 1:
        typed_as_levels = exact <= PIXEL_LEVELS and "/" not in shown
        hint = f"; did you mean {shown}/{PIXEL_LEVELS}?" if typed_as_levels else ""
        raise ValueError(f"epsilon {shown} is more than the whole pixel range [0, 1]{hint}")
    return float(exact)


def _parse_fraction(text: str) -> Fraction:
    """Decimals are welcome on both sides of the slash: format_epsilon writes 25.5/255."""
    if len(text) > LONGEST_NUMBER or EXPONENT.search(text):
        raise ValueError("too long")
    numerator, slash, denominator = text.partition("/")
    if not slash:
        return Fraction(text.strip())
    if "/" in denominator:
        raise ValueError("two slashes")
    return Fraction(numerator.strip()) / Fraction(denominator.strip())


def format_epsilon(epsilon: float) -> str:
    """Print an epsilon in pixel levels, the field's custom: 0.03137 -> '8/255', 0.1 -> '25.5/255'."""
    levels = round(epsilon * PIXEL_LEVELS, 4)
    return f"{levels:g}/{PIXEL_LEVELS}"


Epsilon = Annotated[
    float, BeforeValidator(parse_epsilon), Field(ge=0, le=1), PlainSerializer(lambda value: value, return_type=float)
]
Fraction01 = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, in DVC's dialect. Raises ValueError with one line for whatever is wrong with it."""
    if UNWRITABLE.search(text):
        raise ValueError("holds a number of thousands of digits")
    try:
        value = YAML(typ="safe").load(text)
    except (YAMLError, *STUMBLES) as error:  # a tag or a date out of place
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    _refuse_endless(value)
    return value


def _refuse_endless(value: object) -> None:
    """Raises ValueError for what contains itself, or more than anybody can look at: YAML's anchors make small files of
    enormous values, and whoever prints one takes the memory of the machine.
    """
    try:
        size = _size(value, {})
    except RecursionError:
        size = math.inf
    if size > LARGEST:
        raise ValueError("repeats itself so often, or lies so deep in itself, that nobody can look at all of it")


def _size(value: object, known: dict[int, float]) -> float:
    """How many values there are in this one; infinite where one contains itself."""
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # for who meets it again inside of it
        known[id(value)] = 1 + sum(
            _size(part, known) for part in (value.values() if isinstance(value, Mapping) else value)
        )
    return known[id(value)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises UserError when the file is missing, broken or not a mapping."""
    try:
        content = parse_yaml(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run advmoe from the root of the project") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of sections, found {type(content).__name__}")
    return content


_read: dict[tuple[Path, str], Any] = {}  # sections, as they were when they were read


def watched() -> Callable[[], None]:
    """From here on what is read is remembered; returns the check that it is still the same."""
    _read.clear()
    return _check_unchanged


def _check_unchanged() -> None:
    """Raises UserError when a section is no longer what it was when it was read: DVC, which looks at params.yaml after
    a stage, would put the new values on record beside the results of the old ones.
    """
    for (path, key), before in _read.items():
        if _section(key, path) != before:
            raise UserError(f"{path}: '{key}' was changed while this ran with the old value; run it again")


def load_section(key: str, kind: type[T], path: Path = PARAMS_FILE) -> T:
    """Read one section of params.yaml, `key` with dots for depth ('experts.fgsm-1'), and validate it as `kind`.

    `kind` is a Settings class or any annotation pydantic understands. Raises UserError naming file and key.
    """
    value = _read[path, key] = _section(key, path)
    return validate(value, kind, str(path), key)


def _section(key: str, path: Path) -> Any:
    value: Any = read_yaml(path)
    for depth, part in enumerate(key.split(".")):
        if not isinstance(value, Mapping) or part not in value:
            where = ".".join(key.split(".")[: depth + 1])
            known = f"; known there: {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
            raise UserError(f"{path}: key '{where}' is missing{known}")
        value = value[part]
    return value


def validate(value: object, kind: type[T], where: str, key: str = "") -> T:
    """Validate `value` as `kind`. Raises UserError: `where`, the key below `key`, and the first problem."""
    try:
        _refuse_endless(value)
    except ValueError as error:
        raise UserError(f"{where}: {key}{': ' * bool(key)}{error}") from error
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, value, key)}") from error


def explain(error: ValidationError, value: object, key: str = "") -> str:
    """The first problem with `value` as 'key.subkey: sentence', with a count of the others.

    An unknown key comes before all: it is what was typed, and what it was meant to be is missing because of it.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path = ".".join(part for part in (key, *_path(first["loc"], value)) if part)
    match first["type"]:
        case "missing":
            sentence = "is missing"
        case "extra_forbidden":
            sentence = "is not a known key"
        case "value_error":
            sentence = str(first["ctx"]["error"])
        case _:
            message = first["msg"]
            sentence = f"{message[0].lower()}{message[1:]}, got {_short(first['input'])}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {sentence}{more}" if path else f"{sentence}{more}"


def _path(location: tuple[int | str, ...], value: Any) -> Iterator[str]:
    """The keys on the way to a problem. Pydantic adds the tags of discriminated unions; the file has no such keys."""
    for part in location:
        if isinstance(value, Mapping):
            if part not in value and value.get("kind") == part:
                continue
            value = value.get(part)
        elif isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
            value = value[part]
        yield str(part)


def _short(value: object) -> str:
    try:
        text = BRIEF.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."

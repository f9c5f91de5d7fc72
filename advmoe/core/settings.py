"""Reading and validation of params.yaml: the base class of all settings, parsing of epsilon, error messages.

params.yaml is read in DVC's YAML dialect (1.2, ruamel), where `off` is a string and `1e-3` a number; in PyYAML it is
the other way round. Settings have no defaults: DVC would not track a default in code.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError
from advmoe.core.references import resolve_adversaries

PARAMS_FILE = Path("params.yaml")
PIXEL_LEVELS = 255
# reports of other projects hold epsilons, too; exact arithmetic would write out all zeros of 1e999999999
MAX_EPSILON_LENGTH = 100  # characters
LARGE_EXPONENT = re.compile(r"e[+-]?[0-9_]{4,}", re.IGNORECASE)
MAX_YAML_VALUES = 10**6  # aliases counted as often as they are used; a thousand values are usual
MAX_INTEGER_BITS = 4096  # Python refuses to print integers of more than 4300 digits
MAX_SHOWN_LENGTH = 60  # characters of a value in an error message
SHORT_REPR = Repr()  # bounded work, also for nested and very long values
SHORT_REPR.maxlevel = 3
SHORT_REPR.maxstring = SHORT_REPR.maxother = SHORT_REPR.maxlong = MAX_SHOWN_LENGTH + 2

T = TypeVar("T")


class Settings(BaseModel):
    """Base class of all settings in params.yaml: frozen; unknown keys and infinite or NaN floats are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def parse_epsilon(value: object) -> float:
    """Converts `8/255`, `"0.03"` or `0.03` to a float in [0, 1]. Raises ValueError with a message for each mistake."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"epsilon must be a number or a fraction such as 8/255, not {_short_repr(value)}")
    try:
        exact = _parse_fraction(value) if isinstance(value, str) else Fraction(value)
    except ZeroDivisionError:
        raise ValueError(f"epsilon {_short_repr(value)} divides by zero") from None
    except (ValueError, OverflowError):
        if isinstance(value, float) or (isinstance(value, str) and value.strip().lower() in {"nan", "inf", "-inf"}):
            raise ValueError(f"epsilon must be a finite number, not {value}") from None
        raise ValueError(f"epsilon must be a number or a fraction such as 8/255, not {_short_repr(value)}") from None
    shown = value if isinstance(value, str) else _short_repr(value)
    if exact < 0:
        raise ValueError(f"epsilon is a distance and cannot be negative, but is {shown}")
    if exact > 1:
        typed_as_levels = exact <= PIXEL_LEVELS and "/" not in shown
        hint = f"; did you mean {shown}/{PIXEL_LEVELS}?" if typed_as_levels else ""
        raise ValueError(f"epsilon {shown} is more than the whole pixel range [0, 1]{hint}")
    return float(exact)


def _parse_fraction(text: str) -> Fraction:
    """Parses a decimal, or a fraction of two decimals: format_epsilon writes 25.5/255."""
    if len(text) > MAX_EPSILON_LENGTH or LARGE_EXPONENT.search(text):
        raise ValueError("too long")
    numerator, slash, denominator = text.partition("/")
    if not slash:
        return Fraction(text.strip())
    if "/" in denominator:
        raise ValueError("two slashes")
    return Fraction(numerator.strip()) / Fraction(denominator.strip())


def format_epsilon(epsilon: float) -> str:
    """Formats an epsilon in pixel levels, as is usual in the literature: 0.03137 -> '8/255', 0.1 -> '25.5/255'."""
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
    """Parses a YAML document in DVC's dialect. Raises ValueError with a one-line message for malformed YAML."""
    try:
        return YAML(typ="safe").load(text)
    except (YAMLError, *MALFORMED_INPUT_ERRORS) as error:  # such as a misplaced tag or an invalid date
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def parse_untrusted_yaml(text: str) -> Any:
    """Parses a YAML document of another project. Raises ValueError as `parse_yaml` does, and for documents that
    aliases expand to more than MAX_YAML_VALUES values, or whose integers Python cannot print.
    """
    document = parse_yaml(text)
    stack, count = [document], 0
    while stack:
        value, count = stack.pop(), count + 1
        if count > MAX_YAML_VALUES:
            raise ValueError(f"expands to more than {MAX_YAML_VALUES} values")
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise ValueError("contains an integer of thousands of digits")
        if isinstance(value, Mapping):
            stack += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            stack += value
    return document


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises UserError when the file is missing, malformed or not a mapping."""
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


_sections_read: dict[tuple[Path, str], Any] = {}  # their values when they were read


def track_changes() -> Callable[[], None]:
    """Records the sections that are read from now on. Returns a function that raises UserError if one has changed."""
    _sections_read.clear()
    return _check_unchanged


def _check_unchanged() -> None:
    """Raises UserError when a section has changed since it was read: DVC reads params.yaml after a stage, and would
    record the new values with the results of the old ones.
    """
    for (path, key), before in _sections_read.items():
        if _section(key, path) != before:
            raise UserError(f"{path}: '{key}' was changed during the run; run it again")


def load_section(key: str, schema: type[T], path: Path = PARAMS_FILE) -> T:
    """Reads one section of params.yaml, given by its dotted key ('experts.fgsm-1'), and validates it as `schema`.

    `schema` is a Settings class or any type that pydantic validates. Raises UserError with file and key.
    """
    value = _sections_read[path, key] = _section(key, path)
    return validate(value, schema, str(path), key)


def _section(key: str, path: Path) -> Any:
    value: Any = resolve_adversaries(read_yaml(path), str(path))
    for depth, part in enumerate(key.split(".")):
        if not isinstance(value, Mapping) or part not in value:
            missing = ".".join(key.split(".")[: depth + 1])
            known = f"; known there: {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
            raise UserError(f"{path}: key '{missing}' is missing{known}")
        value = value[part]
    return value


def validate(value: object, schema: type[T], source: str, key: str = "") -> T:
    """Validates `value` as `schema`. Raises UserError with `source`, the key below `key`, and the first problem."""
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{source}: {format_validation_error(error, value, key)}") from error
    except UnicodeEncodeError as error:  # of a validator whose message quotes the value
        raise UserError(f"{source}: contains a character that is not valid Unicode ({error.reason})") from error


def format_validation_error(error: ValidationError, value: object, key: str = "") -> str:
    """Returns the first problem with `value` as 'key.subkey: message', and the number of the others.

    Unknown keys come first: after a typo the intended key is reported as missing, too.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path = ".".join(part for part in (key, *_path(first["loc"], value)) if part)
    match first["type"]:
        case "missing":
            message = "is missing"
        case "extra_forbidden":
            message = "is not a known key"
        case "value_error":
            message = str(first["ctx"]["error"])
        case _:
            text = first["msg"]
            message = f"{text[0].lower()}{text[1:]}, got {_short_repr(first['input'])}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {message}{more}" if path else f"{message}{more}"


def _path(location: tuple[int | str, ...], value: Any) -> Iterator[str]:
    """Yields the keys to a problem, without the tags of discriminated unions, which pydantic adds."""
    for part in location:
        if isinstance(value, Mapping):
            if part not in value and value.get("kind") == part:
                continue
            value = value.get(part)
        elif isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
            value = value[part]
        yield str(part)


def _short_repr(value: object) -> str:
    try:
        text = SHORT_REPR.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= MAX_SHOWN_LENGTH else f"{text[: MAX_SHOWN_LENGTH - 3]}..."

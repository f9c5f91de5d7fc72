"""Helpers of the fuzz tests: hypothesis strategies that corrupt bytes, texts and trees, and checks around each case.

A case may succeed or raise UserError. It must not raise anything else, run code, or take longer than SECONDS. By
default every run draws the same cases; with FUZZ_CASES there are more of them, drawn at random (`make fuzz`).
"""

import copy
import faulthandler
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from conftest import Ran
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from advmoe.core.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "0"))
SECONDS = 20  # limit for one case, also on a busy machine
MEMORY = 3 * 2**30  # bytes of address space that one case may allocate
MAX_MESSAGE_LENGTH = 1000  # characters
ALLOWED = ("git",)  # programs that a case may run
# audit events of running or downloading code
EVENTS = frozenset(
    {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"}
)

Draw = Callable[[SearchStrategy[Any]], Any]


def fuzz(cases: int) -> settings:
    """Returns hypothesis settings with `cases` cases, or FUZZ_CASES if that is set."""
    return settings(
        max_examples=CASES or cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # all cases share a folder; each writes its file again
        phases=(Phase.generate, Phase.shrink),
        print_blob=True,
    )


# ---- checks -----------------------------------------------------------------------------------------------------


class Canary:
    """Records when it is unpickled, which would run code."""

    unpickled = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return record_unpickling, ()


def record_unpickling() -> None:
    Canary.unpickled = True


_events: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None or event not in EVENTS:
        return
    if event == "subprocess.Popen" and str(arguments[0]).rpartition("/")[2] in ALLOWED:
        return
    _events.append(f"{event}{arguments!r:.200}")


sys.addaudithook(_audit)


class TimeLimitExceeded(BaseException):
    """Not an Exception, which the code under test may catch."""


@contextmanager
def watched() -> Iterator[None]:
    """Context manager that fails if the block runs code, or exceeds the limits of time and memory."""
    global _events  # noqa: PLW0603  (an audit hook cannot be removed, only disabled)
    _events, Canary.unpickled = [], False
    try:
        with _time_limit(), _memory_limit():
            yield
        assert not _events
        assert not Canary.unpickled
    except TimeLimitExceeded as error:
        raise AssertionError(str(error)) from error
    finally:
        _events = None


@contextmanager
def _time_limit() -> Iterator[None]:
    def on_alarm(_: int, frame: FrameType | None) -> NoReturn:
        raise TimeLimitExceeded(f"still running after {SECONDS} s, in {frame}")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(SECONDS)
    # the alarm cannot interrupt C code that never returns; this prints the stack and ends the process
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    statistics = Path("/proc/self/statm")
    if not statistics.exists():  # not Linux
        yield
        return
    used = int(statistics.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(action: Callable[[], object]) -> str | None:
    """Returns the message of the UserError that `action` raises, or None if it succeeds. Other exceptions fail."""
    with watched():
        try:
            action()
        except UserError as error:
            return check_message(str(error))
    return None


def check_message(message: str) -> str:
    """Checks that a message is one line of printable characters and not too long; returns it."""
    assert len(message.splitlines()) == 1, message
    assert message.isprintable(), ascii(message)
    assert len(message) <= MAX_MESSAGE_LENGTH, message
    return message


def ended(ran: Ran) -> str | None:
    """Returns the error message of a command that ended with exit code 2, or None if it succeeded."""
    assert ran.code in {0, 2}, ran
    assert "Traceback" not in ran.out + ran.err
    if ran.code == 0:
        return None
    *warnings, last = ran.err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), ran.err
    assert last.startswith("error: "), ran.err
    return check_message(last.removeprefix("error: "))


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing_partial(folder: Path) -> None:
    """Checks that no partly written file is left."""
    assert not [path for path in folder.rglob(".*") if path.suffix == ".partial"]


# ---- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: Draw, whole: bytes, near: int | None = None) -> bytes:
    """Draws `whole` with bits flipped, parts cut, repeated or overwritten, within the first `near` bytes if given."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        last = min(len(content), near or len(content))
        position = draw(st.integers(0, max(0, last - 1)))
        match draw(st.sampled_from(("flip", "cut", "drop", "double", "number", "write"))):
            case "flip" if content:
                content[position] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[position:]
            case "drop":
                del content[position : position + draw(st.integers(1, 64))]
            case "double":
                content[position:position] = content[position : position + draw(st.integers(1, 64))]
            case "number":  # lengths and counts are little- or big-endian integers
                size, order = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from(("little", "big")))
                number = draw(st.sampled_from((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)))
                content[position : position + size] = (number % 2 ** (8 * size)).to_bytes(size, order)
            case _:
                content[position : position + 4] = draw(st.binary(max_size=32))
    return bytes(content)


def _nested(levels: int = 150) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


PLAIN_ODDITIES: tuple[Any, ...] = (  # that JSON can represent
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 1e-300, 1e300, 0.5, -0.0, 2**31, 2**63, -(2**63), 2**64, 10**400),
    *(
        "",
        " ",
        "0",
        "1",
        "1/0",
        "8/255",
        "0/0",
        "nan",
        "inf",
        "1e999999999",
        "1e-999999999",
        "-1",
        "null",
        "../..",
        "/",
    ),
    *("a\nb", "\x1b[31mred", "\x00", "ü🙂\u202e", "\ud800", "x" * 100_000, "9" * 5000, "{0}", "%s", "[red]", "a.b"),
    *([], {}, [None], [[]], [1] * 1000, [""], {"": 1}, {"kind": "pgd"}, {"kind": []}, {"a": {"b": {"c": 1}}}),
)
ODDITIES: tuple[Any, ...] = (  # that YAML can represent in addition
    *PLAIN_ODDITIES,
    *(math.nan, math.inf, -math.inf, 16**500, b"\xff", {1, 2}, (1, 2), {None: 1}, {1: 2}, {math.nan: 1}, {(1, 2): 3}),
    _nested(),
)


class Oddity(int):
    """An index into ODDITIES, printed instead of the value."""


KEYS = ("", "kind", "a.b", "a b", "x" * 10_000, "a\nb", "\x1b[2J", "\ud800", "ü", "0", "../a", "__class__", "seed")


@dataclass(frozen=True, repr=False)
class Spoilt:
    """A corrupted tree, and the list of changes, which is printed instead of the tree."""

    tree: Any
    how: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Spoilt({self.how})"


def iter_entries(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yields every (container, key or index, path) of a tree."""
    keys: Any = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key, f"{path}.{key}"
        yield from iter_entries(tree[key], f"{path}.{key}")


@st.composite
def spoilt(draw: Draw, whole: Any, json_only: bool = False) -> Spoilt:
    """Draws `whole`, a tree of dicts and lists, with values and keys changed, added and removed."""
    tree = copy.deepcopy(whole)
    entries = list(iter_entries(tree))
    how = []
    for _ in range(draw(st.integers(1, 3))):
        container, key, path = entries[draw(st.integers(0, len(entries) - 1))]
        if key in container if isinstance(container, dict) else key < len(container):  # not yet removed
            how.append(f"{path}: {_spoil(draw, container, key, json_only)}")
    return Spoilt(tree, tuple(how))


def _spoil(draw: Draw, container: Any, key: Any, json_only: bool) -> str:
    """Makes one change to `container[key]`; returns its description."""
    what = draw(st.sampled_from(("odd", "odd", "odd", "drop", "rename", "add", "wrap", "sibling", "draw")))
    match what:
        case "drop":
            del container[key]
        case "rename" if isinstance(container, dict):
            container[draw(st.sampled_from(KEYS))] = container.pop(key)
        case "add" if isinstance(container, dict):
            container[draw(st.sampled_from(KEYS))] = container[key]
        case "add":
            container.append(container[key])
        case "wrap":
            container[key] = [container[key]]
        case "sibling":
            keys = list(container) if isinstance(container, dict) else range(len(container))
            container[key] = container[draw(st.sampled_from(keys))]
        case "draw":
            container[key] = draw(st.integers() | st.floats() | st.text(max_size=20))
        case _:
            position = draw(st.integers(0, len(PLAIN_ODDITIES if json_only else ODDITIES) - 1))
            container[key] = ODDITIES[position]
            return f"oddity {position}"
    return str(what)


@st.composite
def damaged_text(draw: Draw, whole: str, pieces: tuple[str, ...]) -> str:
    """Draws `whole` with lines removed, repeated or indented, and `pieces` of syntax inserted."""
    lines = whole.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(0, len(lines) - 1)))
        match draw(st.sampled_from(("drop", "double", "indent", "piece", "value", "line", "character"))):
            case "drop":
                del lines[position : position + 1]
            case "double":
                lines[position:position] = lines[position : position + draw(st.integers(1, 20))]
            case "indent" if lines:
                lines[position] = draw(st.sampled_from(("  ", "\t", "- ", "? ", ""))) + lines[position].lstrip()
            case "piece" if lines:
                column = draw(st.integers(0, len(lines[position])))
                lines[position] = lines[position][:column] + draw(st.sampled_from(pieces)) + lines[position][column:]
            case "value" if lines:
                lines[position] = lines[position].partition(": ")[0] + ": " + draw(st.sampled_from(pieces))
            case "line":
                lines.insert(position, draw(st.sampled_from(pieces)))
            case _:
                lines.insert(position, draw(st.text(max_size=8)))
    return "\n".join(lines) + "\n"


def as_json(tree: Any) -> bytes:
    """Returns JSON, including NaN and lone surrogates."""
    return json.dumps(tree, default=str).encode()

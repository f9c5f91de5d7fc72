"""What the fuzz tests share: damage done to bytes, texts and trees, and the watch kept over each case.

A case may succeed or be refused in one sentence. It may not raise anything else, run code, or take longer than
SECONDS. The short form draws the same cases in every run; FUZZ_CASES makes it long and random (`make fuzz`).
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
SECONDS = 20  # for one case, on a busy machine; what hangs does not end at all
MEMORY = 3 * 2**30  # bytes of address space that one case may ask for on top of what is in use
LONGEST = 1000  # characters of a sentence that somebody is to read
ALLOWED = ("git",)  # programs that a case may start
# what running code, or fetching it, looks like from inside the interpreter
EVENTS = frozenset(
    {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"}
)

Draw = Callable[[SearchStrategy[Any]], Any]


def fuzz(cases: int) -> settings:
    """So many cases in the short form, FUZZ_CASES in the long one."""
    return settings(
        max_examples=CASES or cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # one folder serves all cases, each writes its file anew
        phases=(Phase.generate, Phase.shrink),
        print_blob=True,
    )


# ---- the watch -------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickling this sings."""

    sang = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return sing, ()


def sing() -> None:
    Canary.sang = True


_deeds: list[str] | None = None


def _witness(event: str, arguments: tuple[Any, ...]) -> None:
    if _deeds is None or event not in EVENTS:
        return
    if event == "subprocess.Popen" and str(arguments[0]).rpartition("/")[2] in ALLOWED:
        return
    _deeds.append(f"{event}{arguments!r:.200}")


sys.addaudithook(_witness)


class TooLate(BaseException):
    """No Exception: those may be caught by what is being tested."""


@contextmanager
def watched() -> Iterator[None]:
    """Fail when what is inside runs code, takes too long, or takes the machine's memory."""
    global _deeds  # noqa: PLW0603  (an audit hook cannot be taken back, only told to look away)
    _deeds, Canary.sang = [], False
    try:
        with _in_time(), _in_memory():
            yield
        assert not _deeds
        assert not Canary.sang
    except TooLate as error:
        raise AssertionError(str(error)) from error
    finally:
        _deeds = None


@contextmanager
def _in_time() -> Iterator[None]:
    def late(_: int, frame: FrameType | None) -> NoReturn:
        raise TooLate(f"still running after {SECONDS} s, in {frame}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    # the alarm cannot interrupt C code that never returns; this ends the process and says where it was
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _in_memory() -> Iterator[None]:
    statistics = Path("/proc/self/statm")
    if not statistics.exists():  # no Linux
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
    """The sentence with which `action` was refused; None when it went well. Anything else fails."""
    with watched():
        try:
            action()
        except UserError as error:
            return readable(str(error))
    return None


def readable(sentence: str) -> str:
    """One line of printable characters, of a length that is read."""
    assert len(sentence.splitlines()) == 1, sentence
    assert sentence.isprintable(), ascii(sentence)
    assert len(sentence) <= LONGEST, sentence
    return sentence


def ended(ran: Ran) -> str | None:
    """The same for a command: the sentence of exit code 2, None for success."""
    assert ran.code in {0, 2}, ran
    assert "Traceback" not in ran.out + ran.err
    if ran.code == 0:
        return None
    *warnings, last = ran.err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), ran.err
    assert last.startswith("error: "), ran.err
    return readable(last.removeprefix("error: "))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing_partial(folder: Path) -> None:
    """No file that was begun and not finished."""
    assert not [path for path in folder.rglob(".*") if path.suffix == ".partial"]


# ---- damage ----------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: Draw, whole: bytes, near: int | None = None) -> bytes:
    """`whole` with bits flipped, parts cut, doubled or overwritten, within the first `near` bytes if given."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        last = min(len(content), near or len(content))
        place = draw(st.integers(0, max(0, last - 1)))
        match draw(st.sampled_from(("flip", "cut", "drop", "double", "number", "write"))):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place:]
            case "drop":
                del content[place : place + draw(st.integers(1, 64))]
            case "double":
                content[place:place] = content[place : place + draw(st.integers(1, 64))]
            case "number":  # lengths and counts are little- or big-endian integers
                size, order = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from(("little", "big")))
                number = draw(st.sampled_from((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)))
                content[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, order)
            case _:
                content[place : place + 4] = draw(st.binary(max_size=32))
    return bytes(content)


def _itself() -> list[Any]:
    """A list that contains itself: what an anchor inside its own value gives."""
    found: list[Any] = []
    found.append(found)
    return found


def _bomb(levels: int = 12) -> list[Any]:
    """Nine to the power of `levels` words that share their memory: what anchors of anchors give."""
    found: list[Any] = ["lol"] * 9
    for _ in range(levels):
        found = [found] * 9
    return found


def _nested(levels: int = 150) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


PLAIN_ODDITIES: tuple[Any, ...] = (  # that JSON knows
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
ODDITIES: tuple[Any, ...] = (  # that YAML knows besides
    *PLAIN_ODDITIES,
    *(math.nan, math.inf, -math.inf, 16**500, b"\xff", {1, 2}, (1, 2), {None: 1}, {1: 2}, {math.nan: 1}, {(1, 2): 3}),
    *(_itself(), _bomb(), _nested()),
)


class Oddity(int):
    """A position in ODDITIES: what stands there may be too much to print."""


KEYS = ("", "kind", "a.b", "a b", "x" * 10_000, "a\nb", "\x1b[2J", "\ud800", "ü", "0", "../a", "__class__", "seed")


@dataclass(frozen=True, repr=False)
class Spoilt:
    """A tree, and how it was spoilt; only that is printed, for the tree may be too much."""

    tree: Any
    how: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Spoilt({self.how})"


def places(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every container of a tree with each of its keys or positions, and the way there."""
    keys: Any = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key, f"{path}.{key}"
        yield from places(tree[key], f"{path}.{key}")


@st.composite
def spoilt(draw: Draw, whole: Any, json_only: bool = False) -> Spoilt:
    """A tree of dicts and lists with values and keys changed, added and taken away."""
    tree = copy.deepcopy(whole)
    spots = list(places(tree))
    how = []
    for _ in range(draw(st.integers(1, 3))):
        container, key, path = spots[draw(st.integers(0, len(spots) - 1))]
        if key in container if isinstance(container, dict) else key < len(container):  # not yet taken away
            how.append(f"{path}: {_spoil(draw, container, key, json_only)}")
    return Spoilt(tree, tuple(how))


def _spoil(draw: Draw, container: Any, key: Any, json_only: bool) -> str:
    """Do one thing to `container[key]`; says what."""
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
    """A text with lines lost, doubled, moved in or out, and `pieces` of syntax put into it."""
    lines = whole.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(lines) - 1)))
        match draw(st.sampled_from(("drop", "double", "indent", "piece", "value", "line", "character"))):
            case "drop":
                del lines[place : place + 1]
            case "double":
                lines[place:place] = lines[place : place + draw(st.integers(1, 20))]
            case "indent" if lines:
                lines[place] = draw(st.sampled_from(("  ", "\t", "- ", "? ", ""))) + lines[place].lstrip()
            case "piece" if lines:
                column = draw(st.integers(0, len(lines[place])))
                lines[place] = lines[place][:column] + draw(st.sampled_from(pieces)) + lines[place][column:]
            case "value" if lines:
                lines[place] = lines[place].partition(": ")[0] + ": " + draw(st.sampled_from(pieces))
            case "line":
                lines.insert(place, draw(st.sampled_from(pieces)))
            case _:
                lines.insert(place, draw(st.text(max_size=8)))
    return "\n".join(lines) + "\n"


def as_json(tree: Any) -> bytes:
    """JSON, NaN and lone surrogates and all."""
    return json.dumps(tree, default=str).encode()

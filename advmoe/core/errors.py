"""Errors told in one sentence.

UserError is the one that means: the user can mend this. The command line prints its sentence and exits with code 2.
"""

LONGEST = 1000  # characters of a sentence
# what the readers of libraries stumble over in damaged content, beside the exceptions of their own
STUMBLES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class UserError(ValueError):
    """A mistake in a parameter, a file or a request, told in one sentence that names the file and the key.

    Names and values in it may come from anybody's file: line breaks and control characters are written as escapes.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(_one_line(sentence))


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a sentence: `ValueError: no such luck`."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"


def _one_line(text: str) -> str:
    line = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[: LONGEST + 1]
    )
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."

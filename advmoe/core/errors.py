"""UserError, the exception for mistakes that the user can correct, and helpers for error messages.

The command line prints the message of a UserError and exits with code 2.
"""

MAX_MESSAGE_LENGTH = 1000  # characters
# raised by parsers of other libraries on malformed content, in addition to their own exceptions
MALFORMED_INPUT_ERRORS = (
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
    """A mistake in a parameter, a file or a command-line option. The message is one sentence that names file and key.

    The message may quote untrusted files: line breaks and control characters are escaped, and long messages truncated.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def error_summary(error: BaseException) -> str:
    """Returns the type and the first line of the message, such as `ValueError: invalid literal`."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"


def _one_line(text: str) -> str:
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[: MAX_MESSAGE_LENGTH + 1]
    )
    return line if len(line) <= MAX_MESSAGE_LENGTH else f"{line[: MAX_MESSAGE_LENGTH - 3]}..."

"""Errors told in one sentence.

UserError is the one that means: the user can mend this. The command line prints its sentence and exits with code 2.
"""


class UserError(ValueError):
    """A mistake in a parameter, a file or a request, told in one sentence that names the file and the key."""


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a sentence: `ValueError: no such luck`."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"

"""The one exception that means: the user can mend this. The command line prints its sentence and exits with code 2."""


class UserError(ValueError):
    """A mistake in a parameter, a file or a request, told in one sentence that names the file and the key."""

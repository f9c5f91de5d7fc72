"""The error for missing packages of the extra `advmoe[export]`."""

from advmoe.core.errors import UserError


class MissingExtraError(UserError, ImportError):
    """A package of the extra cannot be imported; both a UserError and an ImportError."""


def missing_package_error(error: ImportError) -> MissingExtraError:
    """Returns the error to raise instead of `error`."""
    name = error.name or str(error)
    return MissingExtraError(f"{name} cannot be imported; install the export packages: pip install 'advmoe[export]'")

"""The packages that only exports need: `pip install 'advmoe[export]'` brings them."""

from advmoe.core.errors import UserError


class MissingExtraError(UserError, ImportError):
    """A package of the extra cannot be imported: one sentence for a person, an ImportError for code that asks."""


def missing(error: ImportError) -> MissingExtraError:
    """What to raise instead of `error`."""
    name = error.name or str(error)
    return MissingExtraError(f"{name} cannot be imported; pip install 'advmoe[export]' brings what exports need")

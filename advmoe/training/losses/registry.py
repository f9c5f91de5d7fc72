"""The objectives there are."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from advmoe.training.losses.adp import Adp
from advmoe.training.losses.dwf import Dwf
from advmoe.training.losses.igat import Igat
from advmoe.training.losses.mart import Mart
from advmoe.training.losses.mart_adp import MartAdp
from advmoe.training.losses.mutual import Mutual


def _named(value: object) -> object:
    """An objective without numbers of its own may be given by its name alone."""
    return {"kind": value} if isinstance(value, str) else value


Objective = Annotated[Dwf | Mart | Adp | MartAdp | Igat | Mutual, Field(discriminator="kind"), BeforeValidator(_named)]

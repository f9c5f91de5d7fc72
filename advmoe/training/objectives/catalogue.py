"""The objectives there are."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from advmoe.training.objectives.adp import Adp
from advmoe.training.objectives.dwf import Dwf
from advmoe.training.objectives.igat import Igat
from advmoe.training.objectives.mart import Mart
from advmoe.training.objectives.mart_adp import MartAdp
from advmoe.training.objectives.mutual import Mutual


def _named(value: object) -> object:
    """An objective without numbers of its own may be given by its name alone."""
    return {"kind": value} if isinstance(value, str) else value


Objective = Annotated[Dwf | Mart | Adp | MartAdp | Igat | Mutual, Field(discriminator="kind"), BeforeValidator(_named)]

"""The union of all losses that `train.recipe` accepts."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from advmoe.training.losses.adp import Adp
from advmoe.training.losses.dwf import Dwf
from advmoe.training.losses.igat import Igat
from advmoe.training.losses.mart import Mart
from advmoe.training.losses.mart_adp import MartAdp
from advmoe.training.losses.mutual import Mutual


def _from_name(value: object) -> object:
    """Accepts the bare name of a loss without parameters."""
    return {"kind": value} if isinstance(value, str) else value


Objective = Annotated[
    Dwf | Mart | Adp | MartAdp | Igat | Mutual, Field(discriminator="kind"), BeforeValidator(_from_name)
]

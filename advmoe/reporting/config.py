"""Settings of the report stage."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from advmoe.core.settings import PositiveInt, Settings
from advmoe.statistics.pairing import Claim


class ReportSection(Settings):
    """`claims` by name, tested on the decisions of the evaluation and, by `advmoe aggregate`, over seeds.

    All claims form one family: each additional claim raises the adjusted p-values. `gallery`: number of examples.
    """

    claims: Annotated[Mapping[str, Claim], Field(min_length=1)]
    gallery: PositiveInt

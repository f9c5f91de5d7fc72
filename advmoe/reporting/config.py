"""What the report claims, and how much it shows."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from advmoe.core.settings import PositiveInt, Settings
from advmoe.statistics.pairing import Claim


class ReportSection(Settings):
    """`claims`, by name: what is to be tested on the decisions of the evaluation, and over seeds by `advmoe aggregate`;
    all of them are one family, so that every further claim makes each a little harder to support. `gallery`: examples.
    """

    claims: Annotated[Mapping[str, Claim], Field(min_length=1)]
    gallery: PositiveInt

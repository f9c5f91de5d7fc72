"""The `membership` section of params.yaml."""

from typing import Annotated

from pydantic import Field, model_validator

from advmoe.attacks.pgd import Pgd
from advmoe.core.settings import Seed, Settings

Shadows = Annotated[int, Field(ge=0, multiple_of=2, strict=True)]


class MembershipSection(Settings):
    """`victims`: how many shadow models each of them gets, trained as it was (an even number: each image is in half of
    them); 0 leaves the loss threshold only. `attack`: makes the adversarial queries, at the top-level epsilon.
    `against`: the victim that the others are compared with; `shadow_seed`: where shadows start, never a victim's.
    """

    victims: Annotated[dict[str, Shadows], Field(min_length=1)]
    against: str
    attack: Pgd
    shadow_seed: Seed

    @model_validator(mode="after")
    def _compared_with_one_of_them(self) -> "MembershipSection":
        if self.against not in self.victims:
            raise ValueError(f"against is '{self.against}', but victims has only {', '.join(self.victims)}")
        return self

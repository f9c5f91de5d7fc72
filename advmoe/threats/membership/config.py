"""The `membership` section of params.yaml."""

from typing import Annotated

from pydantic import Field, model_validator

from advmoe.attacks.pgd import Pgd
from advmoe.core.settings import Seed, Settings

Shadows = Annotated[int, Field(ge=0, multiple_of=2, strict=True)]


class MembershipSection(Settings):
    """`victims`: number of shadow models by victim, trained by its recipe (even: each image is a training image of
    half of them; 0: loss threshold only). `attack`: crafts the adversarial queries, at the top-level epsilon.
    `against`: the victim that the others are compared with; `shadow_seed`: first seed of the shadow models, different
    from the victims'.
    """

    victims: Annotated[dict[str, Shadows], Field(min_length=1)]
    against: str
    attack: Pgd
    shadow_seed: Seed

    @model_validator(mode="after")
    def _against_is_a_victim(self) -> "MembershipSection":
        if self.against not in self.victims:
            raise ValueError(f"against is '{self.against}', but victims has only {', '.join(self.victims)}")
        return self

"""A user's own attack, from a file the user names: `path/to/file.py:function`.

The function has the form of every attack without settings:
`function(model, images_BCHW, labels_B, *, ball, draws, fooled) -> images_BCHW`. What it returns is projected into the
ball and judged like anybody's.
"""

from typing import Literal

from torch import Tensor

from advmoe.attacks.ball import Ball, Draws
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.core import user_code
from advmoe.core.errors import UserError
from advmoe.core.settings import Settings


class Custom(Settings):
    """`function`: path/to/file.py:function."""

    kind: Literal["own"]
    function: str


def custom(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Custom,
    draws: Draws,
    fooled: IsAdversarial | None = None,
) -> Tensor:
    """Whatever the function returns. Raises UserError when it raises, or returns something of another shape or NaN."""
    function = user_code.load_function(settings.function)
    found = user_code.call(
        settings.function, function, model, images_BCHW, labels_B, ball=ball, draws=draws, fooled=fooled
    )
    if not isinstance(found, Tensor) or found.shape != images_BCHW.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{settings.function}: must return images of shape {tuple(images_BCHW.shape)}, not {shape}")
    if not found.isfinite().all():
        raise UserError(f"{settings.function}: returned NaN or infinite pixels")
    return found.to(images_BCHW)

"""Attacks defined by the user in a Python file, named `path/to/file.py:function`.

The function has the form of every attack, without settings:
`function(model, images_BCHW, labels_B, *, ball, draws, is_adversarial) -> images_BCHW`. The returned images are
projected into the ball and classified again, as for every attack.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from advmoe.attacks.ball import Ball, RandomStream
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.core import user_code
from advmoe.core.errors import UserError
from advmoe.core.settings import Settings


class Custom(Settings):
    """`function`: `path/to/file.py:function`."""

    kind: Literal["own"]
    function: str


def custom(
    model: Model,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    ball: Ball,
    settings: Custom,
    draws: RandomStream,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """Returns the images that the user's function returns.

    Raises UserError if the function raises, or returns images of another shape or with values that are not finite.
    """
    function = user_code.load_function(settings.function)
    keywords = {"ball": ball, "draws": draws, _check_keyword(function): is_adversarial}
    points = user_code.call(settings.function, function, model, images_BCHW, labels_B, **keywords)
    if not isinstance(points, Tensor) or points.shape != images_BCHW.shape:
        shape = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise UserError(f"{settings.function}: must return images of shape {tuple(images_BCHW.shape)}, not {shape}")
    if not points.isfinite().all():
        raise UserError(f"{settings.function}: returned NaN or infinite pixels")
    return points.to(images_BCHW)


def _check_keyword(function: Callable[..., Any]) -> str:
    """The function's name for `is_adversarial`: functions written for earlier versions call it `fooled`."""
    try:
        return "fooled" if "fooled" in inspect.signature(function).parameters else "is_adversarial"
    except (TypeError, ValueError):  # a callable without a signature
        return "is_adversarial"

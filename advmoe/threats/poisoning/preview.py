"""A picture of the poison: clean images, changed ones, and the difference, side by side.

Shapes: N images, C channel, H/W pixels.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLUMNS = 8  # images
SIDE = 64  # pixels of an image on paper, at least
GAP = 4  # pixels between images
WHITE = 255


def examples(clean_NCHW: Tensor, changed_NCHW: Tensor) -> bytes:
    """A PNG of three rows: clean, changed, and the difference around grey, stretched to the full range."""
    clean, changed = clean_NCHW[:COLUMNS].float(), changed_NCHW[:COLUMNS].float()
    difference = changed - clean
    stretched = 127.5 + 127.5 * difference / difference.abs().max().clamp_min(1)
    rows = [_row(images) for images in (clean, changed, stretched)]
    picture = Image.fromarray(np.concatenate(rows))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def _row(images_NCHW: Tensor) -> np.ndarray:
    """Images beside each other, (H, W, 3) uint8."""
    zoom = max(1, -(-SIDE // images_NCHW.shape[3]))
    large = images_NCHW.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    framed = torch.nn.functional.pad(large, (0, GAP, 0, GAP), value=WHITE)
    coloured = framed if framed.shape[1] == 3 else framed[:, :1].expand(-1, 3, -1, -1)
    strip: np.ndarray = coloured.permute(2, 0, 3, 1).reshape(framed.shape[2], -1, 3).round().byte().numpy()
    return strip

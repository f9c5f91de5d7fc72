"""A preview image of a poisoned set: clean images, poisoned images and their difference, one below the other.

Shapes: N images, C channel, H/W pixels.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLUMNS = 8  # images per row
SIDE = 64  # minimum width of an image in the preview, in pixels
GAP = 4  # pixels between images
WHITE = 255


def example_grid(clean_NCHW: Tensor, poisoned_NCHW: Tensor) -> bytes:
    """Returns a PNG of three rows: clean images, poisoned images, and their difference scaled to the full range."""
    clean, poisoned = clean_NCHW[:COLUMNS].float(), poisoned_NCHW[:COLUMNS].float()
    difference = poisoned - clean
    stretched = 127.5 + 127.5 * difference / difference.abs().max().clamp_min(1)
    rows = [_row(images) for images in (clean, poisoned, stretched)]
    grid = Image.fromarray(np.concatenate(rows))
    content = io.BytesIO()
    grid.save(content, format="PNG")
    return content.getvalue()


def _row(images_NCHW: Tensor) -> np.ndarray:
    """Returns images side by side, (H, W, 3) uint8."""
    zoom = max(1, -(-SIDE // images_NCHW.shape[3]))
    large = images_NCHW.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    framed = torch.nn.functional.pad(large, (0, GAP, 0, GAP), value=WHITE)
    rgb = framed if framed.shape[1] == 3 else framed[:, :1].expand(-1, 3, -1, -1)
    strip: np.ndarray = rgb.permute(2, 0, 3, 1).reshape(framed.shape[2], -1, 3).round().byte().numpy()
    return strip

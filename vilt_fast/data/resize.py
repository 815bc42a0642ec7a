"""From a photograph to pixels: the sizes ViLT takes, bicubic, scaled to -1..1.

The shorter side becomes 384; if the longer one is then above 639 (1333/800 of it, cut off), both shrink until it is
not; rounded half up, then cut to whole patches of 32: the sizes of HuggingFace's image processor, which tells them.
"""

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..images import reference

SHORTER, DIVISOR = 384, 32


def target_size(height: int, width: int, *, shorter: int = SHORTER, divisor: int = DIVISOR) -> tuple[int, int]:
    """(height, width) after the resize; both are multiples of `divisor`.

    Raises:
        InputError: no pixels, or so long and thin (from about 20 to 1 on, at 384) that less than a patch is left.
    """
    if height < 1 or width < 1:
        raise InputError(f"an image must have pixels, got {height} x {width}.")
    sides = reference.target_size(height, width, shorter, divisor)
    if not all(sides):
        raise InputError(
            f"an image of {height} x {width} pixels is too long and thin: with its longer side at "
            f"{int(1333 / 800 * shorter)}, less than a patch of {divisor} is left of the shorter. Crop it."
        )
    return sides


def to_pixels(image: Image.Image, *, shorter: int = SHORTER, divisor: int = DIVISOR) -> torch.Tensor:
    """float32 [3, height, width] from -1 to 1 of a PIL image in RGB, resized. Raises as `target_size` does."""
    height, width = target_size(image.height, image.width, shorter=shorter, divisor=divisor)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(resized, np.float32)).permute(2, 0, 1).contiguous()
    return levels.div_(255).sub_(0.5).div_(0.5)

"""One image to its pixels as they will be: opened, decoded, upright, resized; still bytes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from . import resize, sources
from .options import Options
from .reference import AMBIGUOUS, target_size


def pixels(image, options: Options, threads: int) -> np.ndarray | None:
    """uint8 [height, width, 3] of one image, with up to `threads` threads; None for what only the reference knows.

    Raises InputError where the result would have no pixels, before anything is decoded.
    """
    encoded = sources.is_encoded(image)
    if encoded:
        image = sources.opened(image)
    if not isinstance(image, Image.Image):
        image = sources.as_array(image)
        if not _checked(image.shape[:2], options):
            return None
        return image if options.shorter is None else _resized(sources.as_image(image), options, threads)
    if not _checked(image.size[::-1], options):
        return None
    if options.fast and options.shorter is not None:
        jpeg = sources.unread_jpeg(image, encoded)
        if jpeg is not None:
            return _of_smaller_jpeg(jpeg, encoded, options, threads)
    if encoded:
        image = sources.upright(image)
    else:
        image.load()
    if image.mode != "RGB" and options.convert:
        image = image.convert("RGB")
    if image.mode != "RGB" or options.convert and image.info.get("transparency") is not None:
        return None
    if not _checked(image.size[::-1], options):  # of some formats only decoding tells the size
        return None
    return np.asarray(image) if options.shorter is None else _resized(image, options, threads)


def _checked(size, options):
    """Whether the reference is sure of the layout of an image of (height, width), before and after it is resized."""
    if not all(size):
        raise InputError(f"an image must have pixels, got {size[0]} x {size[1]} (height x width).")
    wanted = target_size(*size, options.shorter, options.divisor) if options.shorter is not None else size
    if not all(wanted):
        raise InputError(
            f"an image of {size[0]} x {size[1]} (height x width) is too thin: resized to at most "
            f"{int(1333 / 800 * options.shorter)} it would be {wanted[0]} x {wanted[1]}, for sides are multiples of "
            f"{options.divisor}. Crop it."
        )
    return not {*size, *wanted} & {*AMBIGUOUS}


def _of_smaller_jpeg(jpeg, encoded, options, threads):
    """A JPEG that its decoder makes smaller: resized as it lies in the file, then turned."""
    turned = encoded and sources.is_turned(jpeg)
    size = jpeg.size if turned else jpeg.size[::-1]
    wanted = target_size(*size, options.shorter, options.divisor)
    wanted = wanted[::-1] if turned else wanted
    box = resize.smaller(jpeg, wanted)
    image = jpeg if jpeg.mode == "RGB" else jpeg.convert("RGB")
    image = resize.reduced(image, wanted, options.resample, threads, box)
    return np.asarray(ImageOps.exif_transpose(image) if encoded else image)


def _resized(image, options, threads):
    wanted = target_size(image.height, image.width, options.shorter, options.divisor)
    way = resize.reduced if options.fast else resize.exact
    return np.asarray(way(image, wanted, options.resample, threads))

"""What an image may be given as: opened, turned upright, RGB.

Files and bytes are read as transformers' `load_image` reads a path: the EXIF orientation is applied, then all becomes
RGB. A PIL image is taken as it is, as the reference takes it.
"""

from __future__ import annotations

import io
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from .reference import AMBIGUOUS

_ORIENTATION = 0x0112  #: the EXIF tag
_TURNED = (5, 6, 7, 8)  #: its values that exchange height and width


def is_encoded(image) -> bool:
    """A local file or the bytes of one, which are opened here; URLs and base64 text are left to the reference."""
    if isinstance(image, str):
        return os.path.isfile(image)
    return isinstance(image, os.PathLike | bytes | bytearray | memoryview)


def opened(image) -> Image.Image:
    """A file or its bytes as a PIL image of which only the header has been read.

    Raises what Pillow raises: OSError for what is missing or no image, DecompressionBombError for a size that no honest
    image has.
    """
    return Image.open(image if isinstance(image, str | os.PathLike) else io.BytesIO(image))


def is_turned(image: Image.Image) -> bool:
    """Whether it is shown with height and width exchanged."""
    return image.getexif().get(_ORIENTATION) in _TURNED


def upright(image: Image.Image) -> Image.Image:
    """An opened file as RGB, its EXIF orientation applied."""
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def unread_jpeg(image: Image.Image, own: bool) -> Image.Image | None:
    """A JPEG that nobody has decoded yet, to be decoded at another size; None for all else.

    One that is not our `own` is opened anew: telling the decoder of another size changes that of the image, which
    somebody holds.
    """
    if not isinstance(image, JpegImageFile) or not image.tile or image.decoderconfig or image.tell():
        return None
    if own:
        return image
    position = image.fp.tell()
    image.fp.seek(0)
    try:
        return opened(image.fp.read())
    finally:
        image.fp.seek(position)


def read_shared(images: list) -> None:
    """Decode what is read from one open file by several images, which threads must not do at once."""
    unread = [image for image in images if getattr(image, "tile", None) and getattr(image, "fp", None) is not None]
    readers = Counter(id(image.fp) for image in unread)
    for image in unread:
        if readers[id(image.fp)] > 1:
            image.load()


def is_rgb(image: Image.Image, convert: bool) -> bool:
    """Whether a PIL image is RGB, or becomes it by Pillow's own conversion where that is wanted."""
    if not convert:
        return image.mode == "RGB"
    return "A" not in image.getbands() and image.info.get("transparency") is None


def is_channels_last(image) -> bool | None:
    """Whether an array or a tensor is [height, width, 3]; None for all but uint8 RGB in memory with a clear layout."""
    known = (type(image) is np.ndarray and image.dtype == np.uint8) or (
        type(image) is torch.Tensor and image.dtype == torch.uint8 and image.device.type == "cpu"
    )
    if not known or image.ndim != 3:
        return None
    first, last = image.shape[0], image.shape[2]
    if last == 3 and first not in AMBIGUOUS:
        return True
    return False if first == 3 and last not in AMBIGUOUS else None


def as_array(image) -> np.ndarray:
    """Such an array or tensor as [height, width, 3]."""
    array = image if isinstance(image, np.ndarray) else image.numpy()
    return array if is_channels_last(array) else array.transpose(1, 2, 0)


def as_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array))

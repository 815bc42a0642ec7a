"""Odd images: drawn photographs in all sizes, modes and files that people have."""

import io

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112

#: (mode of the file, its format), for those that a format keeps.
FILES = (
    ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"),
    ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP"),
    ("RGB", "TIFF"), ("CMYK", "TIFF"), ("F", "TIFF"), ("1", "TIFF"), ("RGB", "PPM"),
)  # fmt: skip
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV")


def in_mode(picture, mode):
    """A uint8 picture [height, width, 3] as a PIL image of a mode."""
    image = Image.fromarray(picture)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    if mode in ("I", "F"):
        return image.convert("L").convert(mode)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(image.getchannel(0))
    return image.convert(mode)


def size(rng):
    """(height, width): ordinary ones, very thin ones, and sides that could be channels."""
    kind = rng.integers(0, 10)
    if kind == 0:
        return int(rng.integers(1, 6)), int(rng.integers(1, 90))
    if kind == 1:
        return int(rng.integers(20, 500)), int(rng.integers(2, 30))
    return int(rng.integers(30, 400)), int(rng.integers(30, 400))


def encoded(picture, mode, kind, orientation=None, **options):
    """The bytes of a file of a format, with an EXIF orientation where one is given."""
    exif = Image.Exif()
    if orientation is not None:
        exif[_ORIENTATION] = orientation
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and orientation is not None:
        options["exif"] = exif
    file = io.BytesIO()
    in_mode(picture, mode).save(file, kind, **options)
    return file.getvalue()
